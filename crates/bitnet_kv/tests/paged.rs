//! [`PagedKVCache`]: caches of many requests over one pool.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::any::Any;

use bitnet_kv::{CacheOptions, KvError, KvShape, Overflow, PagedKVCache, PagedKVPool, PagedLayerKVCache, Salt};
use candle_core::{DType, Device, Tensor};
use common::{Random, RandomTensor, cat, counts, dense, difference, numbers, tokens};

const SHAPE: KvShape = KvShape::new(3, 2, 16);
const SCALE: f32 = 0.3;

fn random(random: &mut Random, batch: usize, tokens: usize) -> (Tensor, Tensor) {
    let dims = [batch, SHAPE.kv_heads, tokens, SHAPE.head_dim];
    (random.tensor(&dims), random.tensor(&dims))
}

/// One pass: appends the tokens `new` of each layer's keys and values to the layer.
fn pass(cache: &mut PagedKVCache, of: &[(Tensor, Tensor)], new: std::ops::Range<usize>) -> Result<(), KvError> {
    for (layer, (k, v)) in of.iter().enumerate() {
        cache.layers_mut()[layer].append(&tokens(k, new.clone()), &tokens(v, new.clone()))?;
    }
    Ok(())
}

fn assert_holds(layer: &PagedLayerKVCache, k: &Tensor, v: &Tensor) {
    let (got_k, got_v) = (layer.keys().unwrap(), layer.values().unwrap());
    assert_eq!(got_k.dims(), k.dims());
    assert_eq!(
        (numbers(&got_k), numbers(&got_v)),
        (numbers(&k.contiguous().unwrap()), numbers(&v.contiguous().unwrap()))
    );
}

#[test]
fn pools_are_shared_and_caches_can_be_passed_as_any() {
    fn shared<T: Clone + Send + Sync + 'static>(_: &T) {}
    fn sent<T: Send + Sync + Any>(_: &T) {}
    let pool = PagedKVPool::builder(SHAPE).blocks(8).build().unwrap();
    shared(&pool);
    let mut cache = pool.cache();
    sent(&cache);
    let opaque: &mut dyn Any = &mut cache;
    let cache = opaque.downcast_mut::<PagedKVCache>().unwrap();
    assert_eq!((cache.layers().len(), cache.layer_mut(2).is_some(), cache.layer_mut(3).is_none()), (3, true, true));
    let layer = cache.layer_mut(0).unwrap();
    assert_eq!((layer.seq_len(), layer.max_seq_len(), layer.n_kv_heads()), (0, 4096, 2));
    assert_eq!(layer.keys().unwrap().dims(), [1, 2, 0, 16]);
}

#[test]
fn attention_is_that_of_a_dense_cache() {
    let mut numbers = Random::new(1);
    for batch in [1, 3] {
        let pool = PagedKVPool::builder(SHAPE).blocks(60).build().unwrap();
        let mut cache = pool.cache_with(&CacheOptions::default().batch(batch));
        let of: Vec<_> = (0..3).map(|_| random(&mut numbers, batch, 100)).collect();
        let q = numbers.tensor(&[batch, 6, 100, 16]);
        let mut len = 0;
        for n in [23, 1, 1, 40, 1, 30, 4] {
            pass(&mut cache, &of, len..len + n).unwrap();
            len += n;
            for (layer, (k, v)) in of.iter().enumerate() {
                let (q, k, v) = (tokens(&q, len - n..len), tokens(k, 0..len), tokens(v, 0..len));
                for causal in [true, false] {
                    let got = cache.layers()[layer].attend(&q, SCALE, causal).unwrap();
                    assert_eq!(got.dims(), q.dims());
                    let expected = dense(&q, &k, &v, f64::from(SCALE), |at, seen| !causal || seen <= at);
                    assert!(difference(&got, &expected) < 1e-5);
                }
                assert_holds(&cache.layers()[layer], &k, &v);
            }
        }
        assert_eq!((cache.seq_len(), counts(cache.blocks_in_use())), (100, [batch * 7, 0]));
        drop(cache);
        assert_eq!(pool.blocks_in_use(), 0);
    }
}

#[test]
fn a_layer_alone_overflows_as_the_host_s_does() {
    let mut layer = PagedLayerKVCache::new(2, 2, 4, 16, &Device::Cpu).unwrap();
    let (k, v) = random(&mut Random::new(2), 2, 5);
    let error = layer.append(&k, &v).unwrap_err();
    assert!(error.to_string().starts_with("KV cache overflow"), "{error}");
    layer.append(&tokens(&k, 0..4), &tokens(&v, 0..4)).unwrap();
    assert!(layer.append(&tokens(&k, 4..5), &tokens(&v, 4..5)).is_err());
    assert_holds(&layer, &tokens(&k, 0..4), &tokens(&v, 0..4));
    layer.clear();
    assert_eq!(layer.seq_len(), 0);
    layer.append(&tokens(&k, 1..3), &tokens(&v, 1..3)).unwrap();
    assert_holds(&layer, &tokens(&k, 1..3), &tokens(&v, 1..3));
}

#[test]
fn a_layer_cleared_alone_does_not_change_the_others() {
    let mut numbers = Random::new(3);
    let pool = PagedKVPool::builder(SHAPE).blocks(20).build().unwrap();
    let mut cache = pool.cache();
    let prompt: Vec<u32> = (0..40).collect();
    assert_eq!(cache.match_prefix(&prompt).unwrap(), 0);
    let of: Vec<_> = (0..3).map(|_| random(&mut numbers, 1, 60)).collect();
    pass(&mut cache, &of, 0..40).unwrap();
    pass(&mut cache, &of, 40..41).unwrap(); // the prompt is cached now
    let (k, v) = random(&mut numbers, 1, 30);
    cache.layers_mut()[1].clear();
    cache.layers_mut()[1].append(&k, &v).unwrap();
    assert_holds(&cache.layers()[1], &k, &v);
    for layer in [0, 2] {
        assert_holds(&cache.layers()[layer], &tokens(&of[layer].0, 0..41), &tokens(&of[layer].1, 0..41));
    }
    // Other caches match what was computed from the prompt, not what was written over it.
    let mut other = pool.cache();
    assert_eq!(other.match_prefix(&prompt).unwrap(), 39 / 16 * 16);
    assert_holds(&other.layers()[1], &tokens(&of[1].0, 0..32), &tokens(&of[1].1, 0..32));
    cache.clear();
    assert_eq!((cache.seq_len(), counts(cache.blocks_in_use())), (0, [0, 0]));
}

#[test]
fn a_prefix_is_matched_by_one_call_and_shared() {
    let mut numbers = Random::new(4);
    let pool = PagedKVPool::builder(SHAPE).blocks(40).build().unwrap();
    let of: Vec<_> = (0..3).map(|_| random(&mut numbers, 1, 90)).collect();
    let prompt: Vec<u32> = (100..150).collect();
    let mut first = pool.cache();
    assert_eq!(first.match_prefix(&prompt).unwrap(), 0);
    pass(&mut first, &of, 0..50).unwrap();
    for at in 50..70 {
        first.note_tokens(&[at as u32]);
        pass(&mut first, &of, at..at + 1).unwrap();
    }
    drop(first);
    assert_eq!(pool.blocks_in_use(), 0);
    // A second turn: the prompt, the answer, and new tokens.
    let mut turn = prompt.clone();
    turn.extend(50..70);
    turn.extend([7; 20]);
    let mut second = pool.cache();
    let matched = second.match_prefix(&turn).unwrap();
    assert_eq!(matched, 64);
    assert!(second.layers().iter().all(|layer| layer.seq_len() == 64));
    for (layer, (k, v)) in second.layers().iter().zip(&of) {
        assert_holds(layer, &tokens(k, 0..64), &tokens(v, 0..64));
    }
    pass(&mut second, &of, 64..90).unwrap();
    // Two caches at the same time share the blocks of their common prefix, until one of them writes to a block.
    let mut third = pool.cache();
    let branch: Vec<u32> = turn[..40].iter().copied().chain([9; 9]).collect();
    assert_eq!(third.match_prefix(&branch).unwrap(), 40);
    assert_eq!(pool.blocks_in_use(), 6);
    let (k, v) = random(&mut numbers, 1, 9);
    for layer in third.layers_mut() {
        layer.append(&k, &v).unwrap();
    }
    for (layer, (of_k, of_v)) in third.layers().iter().zip(&of) {
        assert_holds(layer, &cat(&[tokens(of_k, 0..40), k.clone()]), &cat(&[tokens(of_v, 0..40), v.clone()]));
    }
    for (layer, (k, v)) in second.layers().iter().zip(&of) {
        assert_holds(layer, k, v);
    }
    let mut tenant = pool.cache_with(&CacheOptions::default().salt(Salt::new(b"another")));
    assert_eq!(tenant.match_prefix(&turn).unwrap(), 0);
    let stats = pool.stats();
    let looked_up = (50 + 90 + 49 + 90) as u64;
    assert_eq!((stats.hits, stats.hits + stats.misses), (64 + 40, looked_up));
    assert!((stats.hit_rate() - 104.0 / looked_up as f64).abs() < 1e-9);
    assert!(matches!(second.match_prefix(&turn), Err(KvError::NotEmpty { len: 90, batch: 1 })));
    pool.reset_prefix_cache();
    assert_eq!(pool.cache().match_prefix(&turn).unwrap(), 0);
}

#[test]
fn a_full_pool_is_an_error_in_the_first_layer_of_a_pass() {
    let mut numbers = Random::new(5);
    let pool = PagedKVPool::builder(SHAPE).blocks(4).build().unwrap();
    let of: Vec<_> = (0..3).map(|_| random(&mut numbers, 1, 70)).collect();
    let (mut a, mut b) = (pool.cache(), pool.cache());
    pass(&mut a, &of, 0..30).unwrap();
    pass(&mut b, &of, 0..30).unwrap();
    let full = a.layers_mut()[0].append(&tokens(&of[0].0, 30..40), &tokens(&of[0].1, 30..40)).unwrap_err();
    assert!(matches!(full, KvError::OutOfBlocks(full) if (full.requested, full.available) == (1, 0)));
    for (layer, (k, v)) in a.layers().iter().zip(&of) {
        assert_holds(layer, &tokens(k, 0..30), &tokens(v, 0..30));
    }
    assert_eq!(counts(a.blocks_in_use()), [2, 0]);
    drop(b);
    pass(&mut a, &of, 30..60).unwrap();
    a.truncate(45).unwrap();
    assert_eq!((a.seq_len(), counts(a.blocks_in_use())), (45, [3, 0]));
    pass(&mut a, &of, 45..64).unwrap();
    for (layer, (k, v)) in a.layers().iter().zip(&of) {
        assert_holds(layer, &tokens(k, 0..64), &tokens(v, 0..64));
    }
}

#[test]
fn a_pool_that_grows_has_room_for_every_cache() {
    let mut numbers = Random::new(6);
    let pool = PagedKVPool::builder(SHAPE).blocks(4).overflow(Overflow::Grow).max_seq_len(32).build().unwrap();
    let of: Vec<_> = (0..3).map(|_| random(&mut numbers, 2, 100)).collect();
    let mut caches: Vec<_> = (0..2).map(|_| pool.cache_with(&CacheOptions::default().batch(2))).collect();
    for at in (0..100).step_by(5) {
        for cache in &mut caches {
            pass(cache, &of, at..at + 5).unwrap();
        }
    }
    let q = numbers.tensor(&[2, 4, 60, 16]);
    for cache in &caches {
        for (layer, (k, v)) in cache.layers().iter().zip(&of) {
            assert_holds(layer, k, v);
            let got = layer.attend(&q, SCALE, true).unwrap();
            assert!(difference(&got, &dense(&q, k, v, f64::from(SCALE), |at, seen| seen <= at)) < 1e-5);
        }
    }
    assert_eq!(pool.stats().growth_events, 3); // from 4 blocks, by 4, 8 and 16
}

#[test]
fn old_tokens_move_to_8_bits_once_and_stay_as_they_are() {
    let mut numbers = Random::new(7);
    let pool = PagedKVPool::builder(SHAPE).blocks(20).compress_older_than(20).build().unwrap();
    let mut cache = pool.cache();
    let of: Vec<_> = (0..3).map(|_| random(&mut numbers, 1, 200)).collect();
    let q = numbers.tensor(&[1, 4, 200, 16]);
    let mut len = 0;
    let mut before: Vec<Vec<f32>> = vec![vec![]; 3];
    for n in [60, 1, 1, 1, 30, 1, 50].into_iter().chain([1; 40]) {
        pass(&mut cache, &of, len..len + n).unwrap();
        let settled = len.saturating_sub(20) / 16 * 16;
        len += n;
        for (layer, (k, v)) in of.iter().enumerate() {
            let (got_k, got_v) = (cache.layers()[layer].keys().unwrap(), cache.layers()[layer].values().unwrap());
            // Recent tokens are exact. Old ones are off by at most half a step of 8 bits, 1/254 of the largest number
            // of the row.
            let recent = (tokens(&got_k, settled..len), tokens(&got_v, settled..len));
            assert_eq!(common::numbers(&recent.0), common::numbers(&tokens(k, settled..len)));
            assert_eq!(common::numbers(&recent.1), common::numbers(&tokens(v, settled..len)));
            let old = common::numbers(&tokens(&got_k, 0..settled));
            for (a, b) in old.iter().zip(common::numbers(&tokens(k, 0..settled))) {
                assert!((a - b).abs() <= 0.5 / 127.0 + 1e-6);
            }
            if settled > 0 {
                assert_ne!(old, common::numbers(&tokens(k, 0..settled)));
            }
            // Tokens are rounded once: those that were old before are the same to the last bit.
            let were = before[layer].len() / (SHAPE.kv_heads * SHAPE.head_dim);
            assert_eq!(common::numbers(&tokens(&got_k, 0..were)), before[layer]);
            before[layer] = old;
            // Attention is over the stored keys and values.
            let q = tokens(&q, len - n..len);
            let got = cache.layers()[layer].attend(&q, SCALE, true).unwrap();
            let expected = dense(&q, &got_k, &got_v, f64::from(SCALE), |at, seen| seen <= at);
            assert!(difference(&got, &expected) < 2e-4, "{}", difference(&got, &expected));
        }
        assert_eq!(counts(cache.blocks_in_use()), [len.div_ceil(16) - settled / 16, settled / 16]);
    }
    let stats = pool.stats();
    let moved = (len - 1).saturating_sub(20) / 16 * 16;
    assert_eq!(stats.compressed_tokens as usize, moved);
    let f32_block = 3 * 2 * 16 * 2 * 16 * 4;
    assert_eq!(stats.bytes_saved + stats.bytes_compressed, moved / 16 * f32_block);
    // A quarter of the size, and two scales for each row of 16 numbers: 68.75 % less.
    assert!((stats.saved_fraction() - 0.6875).abs() < 1e-9, "{}", stats.saved_fraction());
    assert!((1e-4..0.01).contains(&stats.key_error) && (1e-4..0.01).contains(&stats.value_error), "{stats:?}");

    // Truncated to lengths after, at and before the end of what was moved, and continued.
    for back in [len - 3, moved + 1, moved, moved - 5, 16, 3] {
        cache.truncate(back).unwrap();
        let kept = cache.layers()[0].keys().unwrap();
        pass(&mut cache, &of, 100..130).unwrap();
        pass(&mut cache, &of, 130..131).unwrap();
        let keys = cache.layers()[0].keys().unwrap();
        assert_eq!(keys.dims()[2], back + 31);
        let old = before[0].len() / 32;
        let same = back.min(old);
        assert_eq!(common::numbers(&tokens(&keys, 0..same)), common::numbers(&tokens(&kept, 0..same)));
        assert_eq!(common::numbers(&tokens(&keys, back + 11..back + 31)), common::numbers(&tokens(&of[0].0, 111..131)));
        let got = cache.layers()[0].attend(&tokens(&q, 0..25), SCALE, true).unwrap();
        let values = cache.layers()[0].values().unwrap();
        let expected = dense(&tokens(&q, 0..25), &keys, &values, f64::from(SCALE), |at, seen| seen <= at);
        assert!(difference(&got, &expected) < 2e-4);
    }
    drop(cache);
    assert_eq!((pool.blocks_in_use(), pool.compressed_blocks_in_use()), (0, 0));
}

#[test]
fn bad_input_is_an_error_and_changes_nothing() {
    let mut numbers = Random::new(8);
    let pool = PagedKVPool::builder(SHAPE).blocks(20).max_seq_len(50).build().unwrap();
    let mut cache = pool.cache();
    let of: Vec<_> = (0..3).map(|_| random(&mut numbers, 1, 20)).collect();
    pass(&mut cache, &of, 0..20).unwrap();
    let of_dims = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu).unwrap();
    let cases = [
        ("received k [2, 1, 16]", of_dims(&[2, 1, 16], DType::F32)),
        ("expects 2 heads, but received K tensor with 4 heads", of_dims(&[1, 4, 1, 16], DType::F32)),
        ("received k [1, 2, 1, 8]", of_dims(&[1, 2, 1, 8], DType::F32)),
        ("a batch of 1, but received one of 2", of_dims(&[2, 2, 1, 16], DType::F32)),
        ("k is f16, the cache takes f32", of_dims(&[1, 2, 1, 16], DType::F16)),
        ("length 51 exceeds max_seq_len 50", of_dims(&[1, 2, 31, 16], DType::F32)),
    ];
    for (message, bad) in cases {
        let error = cache.layers_mut()[1].append(&bad, &bad).unwrap_err().to_string();
        assert!(error.contains(message), "{error:?} lacks {message:?}");
        for (layer, (k, v)) in cache.layers().iter().zip(&of) {
            assert_eq!(layer.seq_len(), 20);
            assert_holds(layer, k, v);
        }
    }
    let q = of_dims(&[1, 4, 1, 16], DType::F16);
    assert_eq!(cache.layers()[0].attend(&q, 1.0, true).unwrap_err().to_string(), "q is f16, the cache takes f32");
}
