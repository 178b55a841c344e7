//! Sequential generation with the attention geometry of BitNet's 2B model: 30 layers, 20 query and 5 key heads of 128
//! dimensions, f32. Keys, values and queries are given, so that only the cache and attention are timed.
//!
//! - `concatenating` does what `bitnet-transformer` does today: `Tensor::cat` of the whole history, keys and values
//!   repeated for each query head, scores, mask, softmax, product.
//! - `replacing` does what a user of `bitnet-inference`'s `KVCache::update` must do: concatenate the whole history by
//!   token, pass it to `update`, get it back, and attend as above.
//! - `updating` is the same with our cache: `update` takes the new token, `get` returns all tokens, attention is as
//!   above.
//!
//! A token's cost depends on the number of tokens before it. It is measured at a few lengths, all contenders in turn,
//! and interpolated and summed. Our own run is also timed in full, to check that sum.

use std::cell::RefCell;
use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use benches::{Contender, Race, Record, Rounds, is_smoke_test};
use bitnet_kv::{KVCache, KvShape, PagedKVCache, PagedKVPool};
use candle_core::{D, DType, Device, Tensor};

const HEADS: usize = 20;
const KV_HEADS: usize = 5;
const DIM: usize = 128;

fn layers() -> usize {
    if is_smoke_test() { 2 } else { 30 }
}

fn name() -> String {
    format!("{} layers, {HEADS}/{KV_HEADS}x{DIM} f32", layers())
}

/// `(1, heads, tokens, DIM)`.
fn random(heads: usize, tokens: usize) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1., (1, heads, tokens, DIM), &Device::Cpu)?)
}

fn scale() -> f32 {
    1.0 / (DIM as f32).sqrt()
}

fn pool(tokens: usize, sequences: usize) -> Result<PagedKVPool> {
    let shape = KvShape::new(layers(), KV_HEADS, DIM);
    Ok(PagedKVPool::builder(shape).blocks(sequences * (tokens / 16 + 2)).max_seq_len(tokens + 32).build()?)
}

/// The query, key and value of one token in a layer.
struct Token {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Token {
    fn random() -> Result<Self> {
        Ok(Self { q: random(HEADS, 1)?, k: random(KV_HEADS, 1)?, v: random(KV_HEADS, 1)? })
    }
}

/// Passes one token through all layers of our cache.
fn paged(cache: &mut PagedKVCache, token: &Token) -> Result<Tensor> {
    let mut y = token.q.clone();
    for layer in cache.layers_mut() {
        layer.append(&token.k, &token.v)?;
        y = layer.attend(&token.q, scale(), true)?;
    }
    Ok(y)
}

/// Keys and values of all layers, in the shape that the contender stores.
type Histories = Vec<(Tensor, Tensor)>;

fn concatenate(histories: &mut Histories, token: &Token) -> Result<()> {
    for (k, v) in histories.iter_mut() {
        *k = Tensor::cat(&[&*k, &token.k], 2)?;
        *v = Tensor::cat(&[&*v, &token.v], 2)?;
    }
    Ok(())
}

/// Dense attention over `(1, KV_HEADS, T, DIM)`: keys and values repeated for each query head, scores, mask, softmax,
/// product.
fn dense(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let len = k.dim(2)?;
    let repeat = |t: &Tensor| -> Result<Tensor> {
        Ok(t.unsqueeze(2)?.repeat(&[1, 1, HEADS / KV_HEADS, 1, 1])?.reshape((1, HEADS, len, DIM))?)
    };
    let scores = q.matmul(&repeat(k)?.transpose(2, 3)?)?.affine(f64::from(scale()), 0.0)?;
    let scores = scores.broadcast_add(&Tensor::zeros((1, 1, 1, len), DType::F32, &Device::Cpu)?)?;
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
    Ok(weights.matmul(&repeat(v)?)?)
}

fn concatenating(histories: &mut Histories, token: &Token) -> Result<Tensor> {
    let mut y = token.q.clone();
    for (k, v) in histories.iter_mut() {
        *k = Tensor::cat(&[&*k, &token.k], 2)?;
        *v = Tensor::cat(&[&*v, &token.v], 2)?;
        y = dense(&token.q, k, v)?;
    }
    Ok(y)
}

/// Reshapes `(1, KV_HEADS, T, DIM)` to `(T, KV_HEADS, DIM)`.
fn by_token(t: &Tensor) -> Result<Tensor> {
    Ok(t.squeeze(0)?.transpose(0, 1)?.contiguous()?)
}

fn replacing(histories: &mut Histories, token: &Token) -> Result<Tensor> {
    let by_head = |t: &Tensor| -> Result<Tensor> { Ok(t.transpose(0, 1)?.contiguous()?.unsqueeze(0)?) };
    let mut y = token.q.clone();
    for (k, v) in histories.iter_mut() {
        *k = Tensor::cat(&[&*k, &by_token(&token.k)?], 0)?;
        *v = Tensor::cat(&[&*v, &by_token(&token.v)?], 0)?;
        y = dense(&token.q, &by_head(k)?, &by_head(v)?)?;
    }
    Ok(y)
}

/// A cache for [`updating`], with `history` in all layers.
fn updated(history: &(Tensor, Tensor)) -> Result<KVCache> {
    let len = history.0.dim(2)?;
    let mut cache = KVCache::new(len + 64, layers(), KV_HEADS, DIM, &Device::Cpu)?;
    for layer in 0..layers() {
        cache.update(layer, history.0.clone(), history.1.clone(), len)?;
    }
    Ok(cache)
}

/// Adds a token to a layer, and returns the keys and values of all its tokens, `(T, KV_HEADS, DIM)`.
fn update_and_get(cache: &mut KVCache, layer: usize, token: &Token) -> Result<(Tensor, Tensor)> {
    let len = cache.seq_len(layer) + 1;
    cache.update(layer, token.k.clone(), token.v.clone(), len)?;
    Ok(cache.get(layer)?)
}

fn updating(cache: &mut KVCache, token: &Token) -> Result<Tensor> {
    let by_head = |t: &Tensor| -> Result<Tensor> { Ok(t.transpose(0, 1)?.contiguous()?.unsqueeze(0)?) };
    let mut y = token.q.clone();
    for layer in 0..layers() {
        let (k, v) = update_and_get(cache, layer, token)?;
        y = dense(&token.q, &by_head(&k)?, &by_head(&v)?)?;
    }
    Ok(y)
}

/// Nanoseconds that each contender takes for one token after `len` others.
#[derive(Debug, Clone, Copy)]
struct Sample {
    len: usize,
    paged: f64,
    concatenating: f64,
    replacing: f64,
    updating: f64,
    append: f64,
    concatenate: f64,
    update_and_get: f64,
    replace: f64,
}

fn sample(len: usize) -> Result<Sample> {
    let (token, history) = (Token::random()?, (random(KV_HEADS, len)?, random(KV_HEADS, len)?));
    let mut cache = pool(len, 1)?.cache();
    for layer in cache.layers_mut() {
        layer.append(&history.0, &history.1)?;
    }
    let cache = RefCell::new(cache);
    let histories = RefCell::new(vec![history.clone(); layers()]);
    let by_tokens = RefCell::new(vec![(by_token(&history.0)?, by_token(&history.1)?); layers()]);
    let updated = RefCell::new(updated(&history)?);
    let of_token = (by_token(&token.k)?, by_token(&token.v)?);
    let mut contenders: Vec<Contender<'_>> = vec![
        Contender::timed("paged", |_| drop(black_box(paged(&mut cache.borrow_mut(), &token).expect("there is room")))),
        Contender::timed("concatenating", |_| {
            drop(black_box(concatenating(&mut histories.borrow_mut(), &token).expect("the shapes fit")))
        }),
        Contender::timed("replacing", |_| {
            drop(black_box(replacing(&mut by_tokens.borrow_mut(), &token).expect("the shapes fit")))
        }),
        Contender::timed("updating", |_| {
            drop(black_box(updating(&mut updated.borrow_mut(), &token).expect("there is room")))
        }),
        Contender::timed("append", |_| {
            for layer in cache.borrow_mut().layers_mut() {
                layer.append(&token.k, &token.v).expect("there is room");
            }
        }),
        Contender::timed("concatenate", |_| concatenate(&mut histories.borrow_mut(), &token).expect("the shapes fit")),
        Contender::timed("update and get", |_| {
            for layer in 0..layers() {
                black_box(update_and_get(&mut updated.borrow_mut(), layer, &token).expect("there is room"));
            }
        }),
        Contender::timed("replace", |_| {
            for (k, v) in by_tokens.borrow_mut().iter_mut() {
                *k = Tensor::cat(&[&*k, &of_token.0], 0).expect("the shapes fit");
                *v = Tensor::cat(&[&*v, &of_token.1], 0).expect("the shapes fit");
            }
        }),
    ];
    let rounds = if len > 2048 || is_smoke_test() { 1 } else { 3 };
    let race = Race::run(Rounds::exactly(rounds), &mut contenders)?;
    Ok(Sample {
        len,
        paged: race.time(0),
        concatenating: race.time(1),
        replacing: race.time(2),
        updating: race.time(3),
        append: race.time(4),
        concatenate: race.time(5),
        update_and_get: race.time(6),
        replace: race.time(7),
    })
}

/// The time of `tokens` tokens, from samples at a few lengths: interpolated linearly between them, and constant before
/// the first and after the last.
fn sum(samples: &[Sample], tokens: usize, of: fn(&Sample) -> f64) -> f64 {
    let at = |position: usize| {
        let after = samples.iter().position(|sample| sample.len >= position).unwrap_or(samples.len() - 1);
        let (a, b) = (samples[after.saturating_sub(1)], samples[after]);
        if a.len == b.len {
            return of(&b);
        }
        let part = (position as f64 - a.len as f64) / (b.len as f64 - a.len as f64);
        of(&a) + part.clamp(0.0, 1.0) * (of(&b) - of(&a))
    };
    (0..tokens).map(at).sum()
}

fn generation(record: &mut Record) -> Result<()> {
    let smoke = is_smoke_test();
    let lens: &[usize] = if smoke { &[16, 32] } else { &[64, 1024, 2047, 4096, 8191] };
    let samples = lens
        .iter()
        .map(|&len| {
            eprintln!("after {len} tokens");
            sample(len)
        })
        .collect::<Result<Vec<_>>>()?;
    for &tokens in if smoke { &[32][..] } else { &[2048, 8192][..] } {
        let total = |of| sum(&samples, tokens, of);
        let replacing = ("replacing", Some(total(|s| s.replacing)));
        let peers = [("concatenating", Some(total(|s| s.concatenating))), replacing];
        record.time(&format!("generate {tokens} tokens, {}", name()), Some(total(|s| s.paged)), None, &peers);
        let case = format!("generate {tokens} tokens by update and get, {}", name());
        record.time(&case, Some(total(|s| s.updating)), None, &[replacing]);
        let peers = [("concatenation", Some(total(|s| s.concatenate)))];
        record.time(&format!("append {tokens} tokens, {}", name()), Some(total(|s| s.append)), None, &peers);
    }
    for sample in &samples {
        let case = format!("append a token behind {}, {}", sample.len, name());
        record.time(&case, Some(sample.append), None, &[("concatenation", Some(sample.concatenate))]);
        let case = format!("update and get a token behind {}, {}", sample.len, name());
        record.time(&case, Some(sample.update_and_get), None, &[("replacing", Some(sample.replace))]);
        let case = format!("generate a token behind {}, {}", sample.len, name());
        let peers = [("concatenating", Some(sample.concatenating)), ("replacing", Some(sample.replacing))];
        record.time(&case, Some(sample.paged), None, &peers);
    }
    let tokens = if smoke { 32 } else { 2048 };
    let mut cache = pool(tokens, 1)?.cache();
    let token = Token::random()?;
    let started = Instant::now();
    for _ in 0..tokens {
        black_box(paged(&mut cache, &token)?);
    }
    let full = started.elapsed().as_nanos() as f64;
    let case = format!("generate {tokens} tokens one by one, {}", name());
    record.time(&case, Some(full), None, &[("its own sum", Some(sum(&samples, tokens, |s| s.paged)))]);
    Ok(())
}

/// The contenders whose peak memory is measured, each in a new process of this program.
const KEEPERS: [&str; 3] = ["paged", "concatenating", "replacing"];

/// Generates a token after `len` others, and prints the peak memory of the process in KiB, if the system reports it.
fn keep(contender: &str, len: usize) -> Result<()> {
    let token = Token::random()?;
    let history = |_| -> Result<(Tensor, Tensor)> { Ok((random(KV_HEADS, len)?, random(KV_HEADS, len)?)) };
    match contender {
        "paged" => {
            let mut cache = pool(len, 1)?.cache();
            for at in 0..layers() {
                let (k, v) = history(at)?;
                cache.layers_mut()[at].append(&k, &v)?;
            }
            paged(&mut cache, &token)?;
        }
        "concatenating" => drop(concatenating(&mut (0..layers()).map(history).collect::<Result<_>>()?, &token)?),
        _ => {
            let by_tokens = |at| history(at).and_then(|(k, v)| Ok((by_token(&k)?, by_token(&v)?)));
            drop(replacing(&mut (0..layers()).map(by_tokens).collect::<Result<_>>()?, &token)?);
        }
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next());
    println!("{}", peak.unwrap_or_default());
    Ok(())
}

/// The peak memory while a token is generated after `len` others, these included: each contender in its own process.
fn memory(record: &mut Record, len: usize) -> Result<()> {
    for contender in KEEPERS {
        let mut again = Command::new(std::env::current_exe()?);
        again.args(is_smoke_test().then_some("--test")).env("BITNET_KV_KEEP", format!("{contender} {len}"));
        let output = again.output()?;
        ensure!(output.status.success(), "{contender}: {}", String::from_utf8_lossy(&output.stderr));
        if let Ok(kib) = String::from_utf8_lossy(&output.stdout).trim().parse::<f64>() {
            record.value(&format!("{contender} behind {len}, {}", name()), "peak memory", kib * 1024.0 / 1e6, "MB");
        }
    }
    Ok(())
}

/// Four threads with one sequence each from one pool, compared with one thread that computes the four sequences one
/// after another. Each of the four threads has one core, as in a server with more requests than cores. The one thread
/// is measured with one core and with all cores.
fn threads(record: &mut Record) -> Result<()> {
    let tokens = if is_smoke_test() { 16 } else { 512 };
    let inputs = (0..4).map(|_| Token::random()).collect::<Result<Vec<_>>>()?;
    let pool = pool(tokens, 4)?;
    // Returns the attention result of the last token.
    let one = |token: &Token| -> Result<Vec<f32>> {
        let mut cache = pool.cache();
        let mut last = paged(&mut cache, token)?;
        for _ in 1..tokens {
            last = paged(&mut cache, token)?;
        }
        Ok(last.flatten_all()?.to_vec1()?)
    };
    let on_one_core = |token: &Token| -> Result<Vec<f32>> {
        rayon::ThreadPoolBuilder::new().num_threads(1).build()?.install(|| one(token))
    };
    let timed = |work: &dyn Fn() -> Result<Vec<Vec<f32>>>| -> Result<(f64, Vec<Vec<f32>>)> {
        let started = Instant::now();
        let done = work()?;
        Ok((started.elapsed().as_nanos() as f64, done))
    };
    let (all_cores, alone) = timed(&|| inputs.iter().map(one).collect())?;
    let (one_core, _) = timed(&|| inputs.iter().map(on_one_core).collect())?;
    let (at_once, together) = timed(&|| {
        std::thread::scope(|scope| {
            let threads: Vec<_> = inputs.iter().map(|token| scope.spawn(|| on_one_core(token))).collect();
            threads.into_iter().map(|thread| thread.join().ok().context("a thread panicked")?).collect()
        })
    })?;
    ensure!(alone == together, "a thread's result differs from that of the same sequence alone");
    let case = format!("4 threads x {tokens} tokens, {}", name());
    let peers = [("one thread on one core", Some(one_core)), ("one thread on all cores", Some(all_cores))];
    record.time(&case, Some(at_once), None, &peers);
    record.value(&case, "done", 4.0 * tokens as f64 / at_once * 1e9, "tokens/s");
    Ok(())
}

/// The memory that 8-bit storage of old tokens saves, its time, and its error.
fn compressed(record: &mut Record) -> Result<()> {
    let (tokens, recent) = if is_smoke_test() { (64, 16) } else { (2048, 256) };
    let shape = KvShape::new(layers(), KV_HEADS, DIM);
    let builder = PagedKVPool::builder(shape).blocks(tokens / 16 + 2).max_seq_len(tokens + 32);
    let run = |pool: PagedKVPool| -> Result<(f64, PagedKVCache)> {
        let mut cache = pool.cache();
        let mut spent = 0.0;
        for _ in 0..tokens {
            let token = Token::random()?;
            let started = Instant::now();
            black_box(paged(&mut cache, &token)?);
            spent += started.elapsed().as_nanos() as f64;
        }
        Ok((spent, cache))
    };
    let (exact, _) = run(builder.clone().build()?)?;
    let (spent, cache) = run(builder.compress_older_than(recent).build()?)?;
    let stats = cache.pool().stats();
    let case = format!("{tokens} tokens, all but {recent} in 8 bits, {}", name());
    record.time(&case, Some(spent), None, &[("all in f32", Some(exact))]);
    record.value(&case, "saved of old", 100.0 * stats.saved_fraction(), "%");
    record.value(&case, "held", stats.bytes_in_use as f64 / 1e6, "MB");
    record.value(&case, "key error", 100.0 * stats.key_error, "%");
    record.value(&case, "value error", 100.0 * stats.value_error, "%");
    Ok(())
}

fn main() -> Result<()> {
    if let Ok(keep_what) = std::env::var("BITNET_KV_KEEP") {
        let (contender, len) = keep_what.split_once(' ').context("BITNET_KV_KEEP needs a contender and a length")?;
        return keep(contender, len.parse()?);
    }
    let mut record = Record::default();
    for &len in if is_smoke_test() { &[32][..] } else { &[2048, 8192][..] } {
        memory(&mut record, len)?;
    }
    generation(&mut record)?;
    eprintln!("four threads");
    threads(&mut record)?;
    eprintln!("old tokens in 8 bits");
    compressed(&mut record)?;
    record.write("bitnet_kv")
}
