//! Attention over blocks beside the machine's floor and candle's own attention: one new token for each sequence, and the
//! prefill of one, whose floor is the time that as many multiply-adds take in registers.
//!
//! All contenders of a case take turns in one run, on the same threads. Layers take turns too, over at least half a
//! gibibyte, so that the caches see keys and values only once in a while, as when a whole model runs.
//!
//! - `plain` reads the same blocks in the same order once through; `four streams` reads the same bytes as four
//!   interleaved streams, the most that this memory gives.
//! - candle's grouped matrix products and its flash attention read a contiguous cache that is there already.

mod floor;

use std::cell::Cell;
use std::hint::black_box;

use anyhow::{Result, ensure};
use benches::{Contender, Race, Record, is_smoke_test};
use candle_core::{CpuStorage, D, DType, Device, Storage, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::ops::softmax_last_dim;
use half::f16;
use paged_attention::{Attention, BlockTable, KvCache, KvDtype, KvShape};

/// Bytes over which the layers of one case rotate.
const COLD: usize = 512 << 20;

#[derive(Clone, Copy)]
struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    batch: usize,
    context: usize,
    dtype: KvDtype,
    threads: usize,
    /// Tokens in a block; a whole sequence if it is to lie in one piece.
    block_size: usize,
    /// Whether each sequence's blocks lie in random order.
    shuffled: bool,
}

impl Case {
    fn name(&self) -> String {
        let Self { heads, kv_heads, head_dim, batch, context, dtype, threads, block_size, shuffled } = self;
        let blocks = match (*block_size == self.capacity(), shuffled) {
            (true, _) => " contiguous",
            (_, true) => " random order",
            _ => "",
        };
        format!("{heads}/{kv_heads}x{head_dim} {} batch {batch} context {context} threads {threads}{blocks}", dtype)
    }

    /// Slots of a sequence: its tokens in whole blocks of 16.
    fn capacity(&self) -> usize {
        self.context.next_multiple_of(16)
    }

    /// Bytes of the keys and values that one layer reads, scales included.
    fn bytes(&self) -> usize {
        let shape = KvShape { layers: 1, kv_heads: self.kv_heads, head_dim: self.head_dim };
        self.batch * self.context * shape.bytes_per_block(1, self.dtype).expect("a token's bytes can be counted")
    }

    fn layers(&self) -> usize {
        if is_smoke_test() { 1 } else { COLD.div_ceil(self.bytes()) }
    }

    fn random(&self, shape: &[usize]) -> Result<Tensor> {
        // What a model hands over: numbers as wide as those that are stored, and never bytes.
        let dtype = if self.dtype == KvDtype::Int8 { DType::F32 } else { self.dtype.tensor_dtype() };
        Ok(Tensor::randn(0f32, 1., shape, &Device::Cpu)?.to_dtype(dtype)?)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// A cache whose sequences have all their tokens but the last.
    fn filled(&self) -> Result<(KvCache, Vec<BlockTable>)> {
        let shape = KvShape { layers: self.layers(), kv_heads: self.kv_heads, head_dim: self.head_dim };
        let blocks = self.batch * self.capacity() / self.block_size;
        let cache = KvCache::builder(shape).blocks(blocks).block_size(self.block_size).dtype(self.dtype).build()?;
        let mut holes = Vec::new();
        if self.shuffled {
            holes = (0..blocks).map(|_| cache.pool().take(1)).collect::<Result<_, _>>()?;
        }
        let history = self.random(&[self.context - 1, self.kv_heads, self.head_dim])?;
        let mut tables: Vec<_> = (0..self.batch).map(|_| cache.table()).collect();
        let mut random = 1usize;
        for (table, first) in tables.iter_mut().zip((0..).step_by(self.context)) {
            while table.capacity() < self.context {
                if !holes.is_empty() {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    drop(holes.swap_remove((random >> 33) % holes.len()));
                }
                table.reserve(table.capacity() + 1)?;
            }
            let mut step = cache.step();
            // Every sequence has tokens of its own, or they would share their blocks.
            step.push(table, &(first..).take(self.context - 1).collect::<Vec<_>>())?;
            for layer in 0..shape.layers {
                step.write(layer, &history, &history)?;
            }
            step.commit();
        }
        Ok((cache, tables))
    }

    /// Keys and values of one layer, each `(batch, kv_heads, context, head_dim)`.
    fn contiguous(&self) -> Result<Vec<[Tensor; 2]>> {
        let shape = [self.batch, self.kv_heads, self.context, self.head_dim];
        (0..self.layers()).map(|_| Ok([self.random(&shape)?, self.random(&shape)?])).collect()
    }
}

/// One layer after the other, round and round.
struct Turn(Cell<usize>);

impl Turn {
    fn next(&self, layers: usize) -> usize {
        self.0.set((self.0.get() + 1) % layers);
        self.0.get()
    }
}

/// Calls `read` with a layer's numbers, one, two or four bytes each, as words of four.
fn with_words<R>(layer: &Tensor, read: impl FnOnce(&[u32]) -> R) -> Result<R> {
    let (guard, place) = layer.storage_and_layout();
    let own = place.start_offset()..place.start_offset() + layer.elem_count();
    Ok(match &*guard {
        Storage::Cpu(CpuStorage::F32(numbers)) => read(bytemuck::cast_slice(&numbers[own])),
        Storage::Cpu(CpuStorage::F16(numbers)) => read(bytemuck::cast_slice(&numbers[own])),
        Storage::Cpu(CpuStorage::BF16(numbers)) => read(bytemuck::cast_slice(&numbers[own])),
        Storage::Cpu(CpuStorage::U8(numbers)) => read(bytemuck::cast_slice(&numbers[own])),
        _ => anyhow::bail!("the floor is read on a CPU"),
    })
}

fn decode(case: &Case, record: &mut Record) -> Result<()> {
    let threads = rayon::ThreadPoolBuilder::new().num_threads(case.threads).build()?;
    let (cache, mut tables) = case.filled()?;
    let layers = case.layers();
    let order: Vec<u32> = tables.iter().flat_map(|table| table.blocks()).map(|id| id.index() as u32).collect();
    let block = cache.bytes_per_block() / layers / 4;
    ensure!(order.len() * block * 4 >= case.bytes(), "the floor reads all that attention reads");

    let q = case.random(&[case.batch, case.heads, case.head_dim])?;
    let k = case.random(&[case.batch, case.kv_heads, case.head_dim])?;
    let attention = Attention::new(case.scale());
    let mut step = cache.step();
    for table in &mut tables {
        step.push(table, &[0])?;
    }
    let [ours, plain, four, grouped, flash] = [(); 5].map(|()| Turn(Cell::new(0)));
    let floor = |turn: &Turn, read: fn(&[u32], usize, &[u32]) -> u32| {
        let layer = cache.tensor(turn.next(layers)).expect("the layer exists");
        black_box(with_words(layer, |words| threads.install(|| read(words, block, &order))).expect("it is on a CPU"));
    };
    let attend = || {
        let layer = ours.next(layers);
        black_box(threads.install(|| step.attend(layer, &q, &k, &k, &attention)).expect("the shapes fit"));
    };
    // Layouts that differ only in blocks have the same peers.
    let with_peers = case.block_size == 16 && !case.shuffled;
    let contiguous = if with_peers { case.contiguous()? } else { vec![] };
    let group = case.heads / case.kv_heads;
    let grouped_q = (case.random(&[case.batch, case.kv_heads, group, case.head_dim])? * f64::from(case.scale()))?;
    let flash_q = case.random(&[case.batch, 1, case.heads, case.head_dim])?;
    let mut contenders: Vec<Contender<'_>> = vec![
        Box::new(attend),
        Box::new(|| floor(&plain, floor::plain)),
        Box::new(|| floor(&four, floor::four_streams)),
    ];
    if with_peers {
        contenders.push(Box::new(|| {
            let [k, v] = &contiguous[grouped.next(layers)];
            let attend = || -> candle_core::Result<Tensor> {
                softmax_last_dim(&grouped_q.matmul(&k.transpose(D::Minus1, D::Minus2)?)?)?.matmul(v)
            };
            black_box(threads.install(attend).expect("the shapes fit"));
        }));
        // It has neither bf16 nor bytes.
        if matches!(case.dtype, KvDtype::F32 | KvDtype::F16) {
            contenders.push(Box::new(|| {
                let [k, v] = &contiguous[flash.next(layers)];
                let attend = || -> candle_core::Result<Tensor> {
                    let (k, v) = (k.transpose(1, 2)?, v.transpose(1, 2)?);
                    let scale = case.scale();
                    match case.dtype {
                        KvDtype::F16 => flash_attn::<f16>(&flash_q, &k, &v, scale, AttnMask::None, None, None),
                        _ => flash_attn::<f32>(&flash_q, &k, &v, scale, AttnMask::None, None, None),
                    }
                };
                black_box(threads.install(attend).expect("the shapes fit"));
            }));
        }
    }
    let rounds = if is_smoke_test() { 1 } else { 9 };
    let race = Race::run(rounds, &mut contenders);
    let n = contenders.len();
    drop(contenders);

    let name = case.name();
    let peers = ["candle grouped matmuls", "candle-nn flash attention"];
    let peers: Vec<_> = peers.iter().zip(3..n).map(|(&peer, at)| (peer, Some(race.ratio(at, 0)))).collect();
    record.raced(&name, race.time(0), race.ratio(1, 0), &peers);
    record.value(&name, "of four streams", race.ratio(2, 0), "x");
    record.value(&name, "bandwidth", case.bytes() as f64 / race.time(0), "GB/s");
    Ok(())
}

/// The prefill of one causal sequence of `case.context` tokens beside the most multiply-adds that these threads can do.
fn prefill(case: &Case, record: &mut Record) -> Result<()> {
    let threads = rayon::ThreadPoolBuilder::new().num_threads(case.threads).build()?;
    let shape = KvShape { layers: 1, kv_heads: case.kv_heads, head_dim: case.head_dim };
    let cache = KvCache::builder(shape).memory(case.bytes() + (1 << 20)).dtype(case.dtype).build()?;
    let mut table = cache.table();
    let mut step = cache.step();
    step.push(&mut table, &vec![0; case.context])?;
    let q = case.random(&[case.context, case.heads, case.head_dim])?;
    let k = case.random(&[case.context, case.kv_heads, case.head_dim])?;
    let attention = Attention::new(case.scale());
    // Each token sees itself and those before it; a product and a sum for each of its numbers, twice.
    let multiply_adds = 2 * case.context * (case.context + 1) / 2 * case.heads * case.head_dim;
    let chains = multiply_adds / floor::CHAINS / case.threads;
    let mut contenders: Vec<Contender<'_>> = vec![
        Box::new(|| {
            black_box(threads.install(|| step.attend(0, &q, &k, &k, &attention)).expect("the shapes fit"));
        }),
        Box::new(|| {
            black_box(threads.install(|| floor::multiply_adds(chains)));
        }),
    ];
    let race = Race::run(if is_smoke_test() { 1 } else { 5 }, &mut contenders);
    drop(contenders);
    let name = format!("prefill {}", case.name());
    record.raced(&name, race.time(0), race.ratio(1, 0), &[]);
    record.value(&name, "useful", 2.0 * multiply_adds as f64 / race.time(0), "GFLOP/s");
    Ok(())
}

fn main() -> Result<()> {
    let mut record = Record::default();
    // `cargo bench -p benches --bench paged_attention -- f16` runs the cases whose name has `f16` in it.
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let contexts: &[usize] = if is_smoke_test() { &[64] } else { &[4096, 16_384] };
    for (heads, kv_heads, head_dim) in [(32, 8, 128), (9, 3, 64)] {
        for &context in contexts {
            for batch in [1, 8] {
                for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8] {
                    for threads in [1, 2] {
                        let paged = Case {
                            heads,
                            kv_heads,
                            head_dim,
                            batch,
                            context,
                            dtype,
                            threads,
                            block_size: 16,
                            shuffled: false,
                        };
                        let mut cases = vec![paged];
                        if heads == 32 && batch == 1 && dtype != KvDtype::Bf16 {
                            cases.push(Case { block_size: paged.capacity(), ..paged });
                            cases.push(Case { shuffled: true, ..paged });
                        }
                        for case in cases.iter().filter(|case| case.name().contains(&filter)) {
                            eprintln!("{}", case.name());
                            decode(case, &mut record)?;
                        }
                    }
                }
            }
        }
    }
    for dtype in KvDtype::ALL {
        for threads in [1, 2] {
            let (heads, kv_heads, head_dim, batch) = (32, 8, 128, 1);
            let context = if is_smoke_test() { 64 } else { 2048 };
            let (block_size, shuffled) = (16, false);
            let case = Case { heads, kv_heads, head_dim, batch, context, dtype, threads, block_size, shuffled };
            if format!("prefill {}", case.name()).contains(&filter) {
                prefill(&case, &mut record)?;
            }
        }
    }
    record.write("paged_attention")
}
