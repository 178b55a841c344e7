//! [`KVCache`]: what `update` promises.
//!
//! - New tokens are appended to a layer, given alone or as the end of the whole sequence, whatever other layers have.
//! - A layer is truncated to any length and continued, and rows are overwritten in place.
//! - Past `max_seq_len`: an error, a ring, or growth without a copy.
//! - After an error the cache is unchanged.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use bitnet_kv::{KVCache, KVCacheOptions, KvDtype, KvError, Overflow};
use candle_core::{DType, Device, Tensor};
use common::{Random, RandomTensor, cat, counts, dense, difference, flat, numbers, tokens};

const HEADS: usize = 3;
const DIM: usize = 8;
const SCALE: f32 = 0.4;

fn cache(max_seq_len: usize, layers: usize) -> KVCache {
    KVCache::new(max_seq_len, layers, HEADS, DIM, &Device::Cpu).unwrap()
}

fn with(max_seq_len: usize, layers: usize, options: &KVCacheOptions) -> KVCache {
    KVCache::with_options(max_seq_len, layers, HEADS, DIM, &Device::Cpu, options).unwrap()
}

fn random(random: &mut Random, tokens: usize) -> (Tensor, Tensor) {
    (random.tensor(&[1, HEADS, tokens, DIM]), random.tensor(&[1, HEADS, tokens, DIM]))
}

/// Checks that the layer has exactly these keys and values, `[1, H, T, D]`.
fn assert_holds(cache: &KVCache, layer: usize, k: &Tensor, v: &Tensor) {
    let (got_k, got_v) = cache.get(layer).unwrap();
    assert_eq!(got_k.dims(), [k.dims()[2], HEADS, DIM]);
    assert_eq!((numbers(&got_k), numbers(&got_v)), (numbers(&flat(k)), numbers(&flat(v))));
}

#[test]
fn layers_grow_token_by_token_each_with_its_own_length() {
    let mut random_numbers = Random::new(1);
    let mut cache = cache(100, 5);
    let all: Vec<_> = (0..5).map(|_| random(&mut random_numbers, 40)).collect();
    // A prompt, then tokens: alone or as the end of the whole sequence, in both shapes. Layer 3 stops early, layer 4 is
    // empty.
    for (layer, (k, v)) in all.iter().enumerate().take(4) {
        cache.update(layer, tokens(k, 0..7), tokens(v, 0..7), 7).unwrap();
    }
    for len in 8..=40 {
        for (layer, (k, v)) in all.iter().enumerate().take(if len > 20 { 3 } else { 4 }) {
            let first = if layer == 1 { 0 } else { len - 1 };
            let (k, v) = (tokens(k, first..len), tokens(v, first..len));
            let (k, v) = if layer == 2 { (flat(&k), flat(&v)) } else { (k, v) };
            cache.update(layer, k, v, len).unwrap();
        }
    }
    for (layer, (k, v)) in all.iter().enumerate() {
        let len = [40, 40, 40, 20, 0][layer];
        assert_eq!(cache.seq_len(layer), len);
        assert_holds(&cache, layer, &tokens(k, 0..len), &tokens(v, 0..len));
    }
    let usage = cache.memory_usage();
    let block = 5 * 2 * 16 * HEADS * DIM * 4;
    assert_eq!(usage["held_memory_bytes"], 3 * block);
    assert_eq!((usage["current_sequence_length"], usage["max_sequence_length"]), (40, 100));
    // As the host counts: the bytes of `max_seq_len` tokens. `reserved_memory_bytes` is that of whole blocks.
    assert_eq!((usage["tensor_memory_bytes"], usage["reserved_memory_bytes"]), (100 * block / 16, 7 * block));
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.hit_rate()), (4, 1, 0.8));
    cache.clear(&Device::Cpu).unwrap();
    assert_eq!(cache.memory_usage()["held_memory_bytes"], 0);
    assert_eq!(cache.get(0).unwrap().0.dims(), [0, HEADS, DIM]);
}

#[test]
fn random_histories_read_as_a_naive_cache_does() {
    for seed in 0..40 {
        let mut random_numbers = Random::new(seed);
        let options = KVCacheOptions::default().overflow(Overflow::Grow);
        let (mut ours, layers) = (with(20, 3, &options), 3);
        let empty = || (random(&mut Random::new(0), 0), 0);
        let mut naive: Vec<((Tensor, Tensor), usize)> = (0..layers).map(|_| empty()).collect();
        for _ in 0..60 {
            let layer = random_numbers.below(layers);
            let ((k, v), len) = naive[layer].clone();
            let n = random_numbers.below(20);
            let (new_k, new_v) = random(&mut random_numbers, n);
            let ((k, v), new_len, (given_k, given_v)) = match random_numbers.below(4) {
                0 => {
                    let to = random_numbers.below(len + 1);
                    let kept = (tokens(&k, 0..to), tokens(&v, 0..to));
                    (kept.clone(), to, if to == len { random(&mut random_numbers, 0) } else { kept })
                }
                1 if n <= len => {
                    let kept = (tokens(&k, 0..len - n), tokens(&v, 0..len - n));
                    let now = (cat(&[kept.0, new_k.clone()]), cat(&[kept.1, new_v.clone()]));
                    (now, len, (new_k, new_v))
                }
                choice => {
                    let now = (cat(&[k, new_k.clone()]), cat(&[v, new_v.clone()]));
                    (now.clone(), len + n, if choice == 2 && n > 0 { now } else { (new_k, new_v) })
                }
            };
            let replaced = new_len == len && given_k.dims()[2] == len && len > 0;
            match ours.update(layer, given_k, given_v, new_len) {
                Ok(()) => naive[layer] = ((k, v), new_len),
                // A whole sequence in place of another one of the same length.
                Err(KvError::OtherTokens { at: 0, .. }) if replaced => {}
                Err(error) => panic!("{seed}: {error}"),
            }
            for (layer, ((k, v), len)) in naive.iter().enumerate() {
                assert_eq!(ours.seq_len(layer), *len);
                assert_holds(&ours, layer, k, v);
            }
        }
        let longest = naive.iter().map(|(_, len)| *len).max().unwrap();
        let used = ours.blocks_in_use().recent;
        // Each growth may leave one block partly filled.
        let most = longest.div_ceil(16) + ours.stats().growth_events as usize;
        assert!((longest.div_ceil(16)..=most).contains(&used), "{used} blocks for {longest} tokens");
    }
}

#[test]
fn a_cache_truncated_to_any_length_can_be_continued() {
    let mut random_numbers = Random::new(2);
    let (k, v) = random(&mut random_numbers, 70);
    let (more_k, more_v) = random(&mut random_numbers, 20);
    for len in 0..=70 {
        let mut cache = cache(100, 2);
        for layer in 0..2 {
            cache.update(layer, k.clone(), v.clone(), 70).unwrap();
        }
        for layer in 0..2 {
            cache.update(layer, tokens(&k, 0..len), tokens(&v, 0..len), len).unwrap();
        }
        assert_eq!(counts(cache.blocks_in_use()), [usize::div_ceil(len, 16), 0]);
        for layer in 0..2 {
            cache.update(layer, more_k.clone(), more_v.clone(), len + 20).unwrap();
            let (k, v) = (cat(&[tokens(&k, 0..len), more_k.clone()]), cat(&[tokens(&v, 0..len), more_v.clone()]));
            assert_holds(&cache, layer, &k, &v);
        }
        assert_eq!(counts(cache.blocks_in_use()), [(len + 20).div_ceil(16), 0]);
    }
}

#[test]
fn a_cache_grows_and_attention_sees_all_of_it() {
    let mut random_numbers = Random::new(3);
    let mut cache = cache(24, 2);
    let (k, v) = random(&mut random_numbers, 200);
    let q = random_numbers.tensor(&[1, 2 * HEADS, 200, DIM]);
    for layer in 0..2 {
        cache.update(layer, tokens(&k, 0..24), tokens(&v, 0..24), 24).unwrap();
    }
    let full = cache.update(0, tokens(&k, 24..25), tokens(&v, 24..25), 25).unwrap_err();
    assert!(matches!(full, KvError::Overflow { len: 25, max_seq_len: 24 }), "{full}");
    cache.enable_dynamic_growth();
    for len in 25..=200 {
        for layer in 0..2 {
            cache.update(layer, tokens(&k, len - 1..len), tokens(&v, len - 1..len), len).unwrap();
        }
        if len % 35 == 0 || len == 200 {
            for rows in [1, 10, len] {
                let q = tokens(&q, len - rows..len);
                for causal in [true, false] {
                    let got = cache.attend(1, &q, SCALE, causal).unwrap();
                    let sees = |at: usize, seen: usize| !causal || seen <= at;
                    let (k, v) = (tokens(&k, 0..len), tokens(&v, 0..len));
                    assert!(difference(&got, &dense(&q, &k, &v, f64::from(SCALE), sees)) < 1e-5, "{len} {rows}");
                }
            }
        }
    }
    assert_holds(&cache, 1, &k, &v);
    // From 2 blocks, each time by as many as there are: 2, 4, 8.
    assert_eq!(cache.stats().growth_events, 3);
    assert_eq!(counts(cache.blocks_in_use()), [13, 0]);
    assert_eq!(cache.memory_usage()["max_sequence_length"], 200);
    assert_eq!(cache.stats().bytes_allocated, 16 * 2 * 2 * 16 * HEADS * DIM * 4);
}

#[test]
fn a_ring_sees_its_sink_tokens_and_its_window_in_bounded_memory() {
    for (max_seq_len, sink_tokens) in [(32, 0), (33, 4), (40, 16), (17, 1)] {
        let mut random_numbers = Random::new(4);
        let options = KVCacheOptions::default().overflow(Overflow::Circular { sink_tokens });
        let mut cache = with(max_seq_len, 2, &options);
        let (k, v) = random(&mut random_numbers, 150);
        let q = random_numbers.tensor(&[1, HEADS, 150, DIM]);
        let mut most = 0;
        let mut len = 0;
        while len < 150 {
            let n = [1, 1, 5][random_numbers.below(3)].min(150 - len);
            for layer in 0..2 {
                cache.update(layer, tokens(&k, len..len + n), tokens(&v, len..len + n), len + n).unwrap();
                let q = tokens(&q, len..len + n);
                let got = cache.attend(layer, &q, SCALE, true).unwrap();
                let window = max_seq_len - sink_tokens;
                let sees = |at: usize, seen: usize| seen <= at && (seen < sink_tokens || seen + window > at);
                let (k, v) = (tokens(&k, 0..len + n), tokens(&v, 0..len + n));
                assert!(difference(&got, &dense(&q, &k, &v, f64::from(SCALE), sees)) < 1e-5, "{len}");
            }
            len += n;
            most = most.max(cache.blocks_in_use().recent);
        }
        let recent = 150 - (max_seq_len - sink_tokens)..150;
        let kept = |t: &Tensor| cat(&[tokens(t, 0..sink_tokens), tokens(t, recent.clone())]);
        assert_holds(&cache, 1, &kept(&k), &kept(&v));
        // The blocks of the sink tokens and of the window, one more because the window may begin inside a block, and
        // one for the new tokens.
        let bound = usize::div_ceil(sink_tokens, 16) + (max_seq_len - sink_tokens).div_ceil(16) + 2;
        assert!(most <= bound, "{most} blocks, at most {bound}");
        assert!(cache.stats().evictions > 0);
        // Most of the earlier tokens were freed, so the truncation is an error.
        let back = cache.update(0, tokens(&k, 0..100), tokens(&v, 0..100), 100).unwrap_err();
        assert!(matches!(back, KvError::OutOfWindow(_)), "{back}");
        assert_holds(&cache, 0, &kept(&k), &kept(&v));
    }
}

#[test]
fn bad_input_is_an_error_and_changes_nothing() {
    let mut random_numbers = Random::new(5);
    let mut cache = cache(30, 2);
    let (k, v) = random(&mut random_numbers, 30);
    for layer in 0..2 {
        cache.update(layer, tokens(&k, 0..20), tokens(&v, 0..20), 20).unwrap();
    }
    let good = |n| Tensor::zeros((1, HEADS, n, DIM), DType::F32, &Device::Cpu).unwrap();
    let of = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu).unwrap();
    let cases: Vec<(&str, usize, Tensor, Tensor, usize)> = vec![
        ("Layer index 2 out of bounds: the cache has 2 layers", 2, good(1), good(1), 21),
        ("received k [3, 8] and v [3, 8]", 0, of(&[3, 8], DType::F32), of(&[3, 8], DType::F32), 21),
        (
            "expects 3 heads, but received K tensor with 2",
            0,
            of(&[1, 2, 1, 8], DType::F32),
            of(&[1, 2, 1, 8], DType::F32),
            21,
        ),
        ("received k [1, 3, 1, 4]", 0, of(&[1, 3, 1, 4], DType::F32), of(&[1, 3, 1, 4], DType::F32), 21),
        ("and v [1, 3, 2, 8]", 0, good(1), good(2), 21),
        ("k is f64, the cache takes f32", 0, of(&[1, 3, 1, 8], DType::F64), good(1), 21),
        ("v is bf16, the cache takes f32", 0, good(1), of(&[1, 3, 1, 8], DType::BF16), 21),
        (
            "2 tokens (k [1, 3, 2, 8] and v [1, 3, 2, 8]) do not bring a layer of 20 tokens to seq_len 21",
            0,
            good(2),
            good(2),
            21,
        ),
        ("expected 5 new ones or all 25", 1, good(1), good(1), 25),
        ("expected all 10 or none", 1, good(3), good(3), 10),
        ("expected at most 20", 1, good(21), good(21), 20),
        ("batch of 1, but received one of 2", 1, of(&[2, 3, 1, 8], DType::F32), of(&[2, 3, 1, 8], DType::F32), 21),
        ("length 31 exceeds max_seq_len 30", 1, good(11), good(11), 31),
    ];
    for (message, layer, bad_k, bad_v, seq_len) in cases {
        let error = cache.update(layer, bad_k, bad_v, seq_len).unwrap_err().to_string();
        assert!(error.replace(", v", " and v").contains(message), "{error:?} lacks {message:?}");
        for layer in 0..2 {
            assert_holds(&cache, layer, &tokens(&k, 0..20), &tokens(&v, 0..20));
        }
        assert_eq!(counts(cache.blocks_in_use()), [2, 0]);
    }
    assert!(cache.get(2).unwrap_err().to_string().contains("out of bounds"));
    assert!(cache.prefetch(2, 5).unwrap_err().to_string().contains("out of bounds"));
    assert!(cache.prefetch(1, 5).is_ok());
    let q = |heads, tokens| Tensor::zeros((1, heads, tokens, DIM), DType::F32, &Device::Cpu).unwrap();
    for q in [q(4, 1), q(3, 21), q(3, 0), good(1).squeeze(0).unwrap()] {
        assert!(matches!(cache.attend(0, &q, 1.0, true), Err(KvError::Queries { .. })));
    }
    let refused =
        |max, layers, heads, dim| KVCache::new(max, layers, heads, dim, &Device::Cpu).unwrap_err().to_string();
    assert_eq!(refused(0, 1, 1, 4), "max_seq_len must be > 0");
    assert_eq!(refused(1, 0, 1, 4), "num_layers must be > 0");
    assert_eq!(refused(1, 1, 0, 4), "num_heads must be > 0");
    assert!(refused(1, 1, 1, 6).starts_with("head_dim must be > 0 and divisible by 4"));
    let ring = KVCacheOptions::default().overflow(Overflow::Circular { sink_tokens: 8 });
    assert!(KVCache::with_options(8, 1, 1, 4, &Device::Cpu, &ring).is_err());
    let both = KVCacheOptions::default().overflow(Overflow::Circular { sink_tokens: 2 }).compress_older_than(4);
    assert!(KVCache::with_options(8, 1, 1, 4, &Device::Cpu, &both).is_err());
}

#[test]
fn a_cache_has_a_batch_of_any_size() {
    let mut random_numbers = Random::new(6);
    for overflow in [Overflow::Error, Overflow::Circular { sink_tokens: 8 }, Overflow::Grow] {
        for compressed in [false, true] {
            if compressed && overflow != Overflow::Error {
                continue;
            }
            let options = KVCacheOptions::default().overflow(overflow);
            let options = if compressed { options.compress_older_than(8) } else { options };
            let mut cache = with(40, 2, &options);
            for batch in [3, 1, 9, 2] {
                let (k, v) =
                    (random_numbers.tensor(&[batch, HEADS, 40, DIM]), random_numbers.tensor(&[batch, HEADS, 40, DIM]));
                for layer in 0..2 {
                    cache.update(layer, tokens(&k, 0..33), tokens(&v, 0..33), 33).unwrap();
                }
                for len in 34..=40 {
                    for layer in 0..2 {
                        cache.update(layer, tokens(&k, len - 1..len), tokens(&v, len - 1..len), len).unwrap();
                    }
                }
                let bytes = 2 * 2 * HEADS * DIM * 4;
                assert_eq!(cache.memory_usage()["tensor_memory_bytes"], batch * 40 * bytes);
                let q = random_numbers.tensor(&[batch, 2 * HEADS, 4, DIM]);
                let got = cache.attend(1, &q, SCALE, true).unwrap();
                let bound = if compressed { 0.02 } else { 1e-5 };
                assert!(difference(&got, &dense(&q, &k, &v, f64::from(SCALE), |at, seen| seen <= at)) < bound);
                if batch > 1 && !compressed {
                    let (got_k, got_v) = cache.get(0).unwrap();
                    assert_eq!((numbers(&got_k), numbers(&got_v)), (numbers(&k), numbers(&v)));
                }
                cache.clear(&Device::Cpu).unwrap();
                assert_eq!(cache.memory_usage()["held_memory_bytes"], 0);
            }
        }
    }
}

#[test]
fn a_ring_takes_a_pass_of_any_length() {
    for (batch, dtype) in [(1, KvDtype::F32), (3, KvDtype::F32), (1, KvDtype::Bf16), (1, KvDtype::Int8)] {
        for sink_tokens in [0, 5] {
            let mut random_numbers = Random::new(9);
            let options = KVCacheOptions::default().overflow(Overflow::Circular { sink_tokens }).dtype(dtype);
            let mut cache = with(64, 2, &options);
            let given = if dtype == KvDtype::Bf16 { DType::BF16 } else { DType::F32 };
            let (k, v) =
                (random_numbers.tensor(&[batch, HEADS, 2000, DIM]), random_numbers.tensor(&[batch, HEADS, 2000, DIM]));
            let (k, v) = (k.to_dtype(given).unwrap(), v.to_dtype(given).unwrap());
            let mut len = 0;
            for (pass, back) in [(161, 0), (1, 0), (400, 1), (3, 2), (700, 30), (80, 0), (200, 0)] {
                let start = len;
                len += pass;
                for layer in 0..2 {
                    cache.update(layer, tokens(&k, start..len), tokens(&v, start..len), len).unwrap();
                    let rows = pass.min(40);
                    let q = random_numbers.tensor(&[batch, HEADS, rows, DIM]).to_dtype(given).unwrap();
                    let got = cache.attend(layer, &q, SCALE, true).unwrap().to_dtype(DType::F32).unwrap();
                    let sees =
                        |at: usize, seen: usize| seen <= at && (seen < sink_tokens || seen + 64 - sink_tokens > at);
                    let exact = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
                    let (q, k, v) = (exact(&q), exact(&tokens(&k, 0..len)), exact(&tokens(&v, 0..len)));
                    let bound = if dtype == KvDtype::F32 { 1e-5 } else { 0.02 };
                    assert!(difference(&got, &dense(&q, &k, &v, f64::from(SCALE), sees)) < bound, "{len} {dtype:?}");
                }
                // Truncate a part of the last pass.
                let none = Tensor::zeros((batch, HEADS, 0, DIM), given, &Device::Cpu).unwrap();
                len -= back;
                for layer in 0..2 {
                    cache.update(layer, none.clone(), none.clone(), len).unwrap();
                }
            }
            // The pool was enlarged for the passes, but the blocks in use are still those of a ring.
            assert!(cache.memory_usage()["reserved_memory_bytes"] > cache.memory_usage()["tensor_memory_bytes"]);
            for layer in 0..2 {
                cache.update(layer, tokens(&k, len..len + 1), tokens(&v, len..len + 1), len + 1).unwrap();
            }
            assert!(cache.blocks_in_use().recent <= batch * 7, "{:?}", counts(cache.blocks_in_use()));
        }
    }
}

#[test]
fn shorter_layers_keep_their_tokens_when_a_ring_is_enlarged() {
    for leader in 0..3 {
        let mut random_numbers = Random::new(10);
        let mut cache = with(16, 3, &KVCacheOptions::default().overflow(Overflow::Circular { sink_tokens: 2 }));
        let (k, v) = random(&mut random_numbers, 600);
        let give = |cache: &mut KVCache, layer: usize, from: usize, to: usize| {
            cache.update(layer, tokens(&k, from..to), tokens(&v, from..to), to).unwrap();
        };
        (0..3).for_each(|layer| give(&mut cache, layer, 0, 20));
        give(&mut cache, leader, 20, 40);
        give(&mut cache, leader, 40, 500);
        // The first of these tokens see tokens of earlier passes.
        let q = random_numbers.tensor(&[1, HEADS, 460, DIM]);
        let got = cache.attend(leader, &q, SCALE, true).unwrap();
        let sees = |at: usize, seen: usize| seen <= at && (seen < 2 || seen + 14 > at);
        let (all_k, all_v) = (tokens(&k, 0..500), tokens(&v, 0..500));
        assert!(difference(&got, &dense(&q, &all_k, &all_v, f64::from(SCALE), sees)) < 1e-5);
        for layer in (0..3).filter(|&layer| layer != leader) {
            give(&mut cache, layer, 20, 40);
            give(&mut cache, layer, 40, 500);
        }
        let kept = |t: &Tensor| cat(&[tokens(t, 0..2), tokens(t, 486..500)]);
        for layer in 0..3 {
            assert_holds(&cache, layer, &kept(&k), &kept(&v));
        }
    }
}
