//! For any lengths, layers and sizes, a cache returns at once: an error with the numbers, or what is documented.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use bitnet_kv::{CacheOptions, KVCache, KVCacheOptions, KvError, KvShape, Overflow, PagedKVPool, PagedLayerKVCache};
use candle_core::{DType, Device, Tensor};
use common::{Random, RandomTensor, counts, numbers};

const SHAPE: KvShape = KvShape::new(2, 2, 8);

/// Numbers at which arithmetic may overflow.
const EXTREMES: [usize; 8] = [
    1 << 31,
    1 << 40,
    isize::MAX as usize - 1,
    isize::MAX as usize,
    isize::MAX as usize + 1,
    usize::MAX / 2,
    usize::MAX - 1,
    usize::MAX,
];

fn overflows() -> [Overflow; 4] {
    [Overflow::Error, Overflow::Circular { sink_tokens: 0 }, Overflow::Circular { sink_tokens: 3 }, Overflow::Grow]
}

/// `[1, 2, tokens, 8]`.
fn random(tokens: usize) -> Tensor {
    Random::new(1).tensor(&[1, 2, tokens, 8])
}

#[test]
fn values_are_as_wide_as_keys() {
    let shape = bitnet_kv::KvShape::new(1, 1, 8);
    for shape in [shape.value_dim(4), shape.values_in_keys(8)] {
        let error = bitnet_kv::PagedKVPool::builder(shape).blocks(4).build().unwrap_err();
        assert!(matches!(error, bitnet_kv::KvError::Options(_)), "{error}");
    }
}

#[test]
fn extreme_lengths_of_a_paged_cache() {
    for overflow in overflows() {
        for n in EXTREMES {
            let pool = PagedKVPool::builder(SHAPE).blocks(8).block_size(4).overflow(overflow).max_seq_len(n);
            let pool = pool.build().unwrap();
            let mut cache = pool.cache();
            let kv = random(9);
            cache.layers_mut().iter_mut().for_each(|layer| layer.append(&kv, &kv).unwrap());
            cache.layers_mut().iter_mut().for_each(|layer| layer.append(&random(1), &random(1)).unwrap());
            cache.truncate(n).unwrap();
            assert_eq!((cache.seq_len(), cache.max_seq_len(), cache.layer_mut(n).is_none()), (10, n, true));
            cache.truncate(9).unwrap();
            let q = random(9);
            for layer in cache.layers() {
                assert_eq!(numbers(&layer.keys().unwrap()), numbers(&kv));
                assert_eq!(layer.attend(&q, 0.3, true).unwrap().dims(), q.dims());
            }
        }
        // Sink tokens must leave room for a window.
        for max_seq_len in [1, 4] {
            let pool = PagedKVPool::builder(SHAPE).blocks(8).block_size(4).max_seq_len(max_seq_len);
            for sink_tokens in [max_seq_len, usize::MAX] {
                let error = pool.clone().overflow(Overflow::Circular { sink_tokens }).build().unwrap_err().to_string();
                assert!(
                    error.contains(&format!("{sink_tokens} sink tokens leave no window: max_seq_len is {max_seq_len}")),
                    "{error}"
                );
            }
        }
    }
    for n in EXTREMES {
        // Pools that cannot be allocated, and batch sizes that no tensor has.
        assert!(PagedKVPool::builder(SHAPE).blocks(n).build().is_err());
        assert!(PagedKVPool::builder(SHAPE).blocks(8).block_size(n).build().is_err());
        assert!(PagedLayerKVCache::new(n, 2, n, 8, &Device::Cpu).is_err());
        let pool = PagedKVPool::builder(SHAPE).blocks(8).build().unwrap();
        let mut cache = pool.cache_with(&CacheOptions::default().batch(n));
        let error = cache.layers_mut()[0].append(&random(1), &random(1)).unwrap_err();
        assert!(matches!(error, KvError::Batch { expected, got: 1, .. } if expected == n), "{error}");
        assert_eq!((cache.seq_len(), counts(cache.blocks_in_use())), (0, [0, 0]));
        if n <= 1 << 40 {
            assert_eq!(cache.layers()[0].keys().unwrap().dims(), [n, 2, 0, 8]); // candle has no larger shapes
        }
        cache.truncate(n).unwrap();
        // No token is older than the last `n`, so nothing is moved to 8-bit storage.
        let pool = PagedKVPool::builder(SHAPE).blocks(8).block_size(4).compress_older_than(n).build().unwrap();
        let mut cache = pool.cache();
        (0..3).for_each(|_| {
            cache.layers_mut().iter_mut().for_each(|layer| layer.append(&random(5), &random(5)).unwrap())
        });
        assert_eq!(counts(cache.blocks_in_use()), [4, 0]);
    }
}

#[test]
fn extreme_lengths_of_an_updated_cache() {
    for overflow in overflows() {
        let options = KVCacheOptions::default().overflow(overflow);
        let make = |max_seq_len| KVCache::with_options(max_seq_len, 2, 2, 8, &Device::Cpu, &options);
        for n in EXTREMES {
            assert!(make(n).is_err(), "{n} tokens are allocated at once");
            let mut cache = make(20).unwrap();
            let kv = random(9);
            (0..2).for_each(|layer| cache.update(layer, kv.clone(), kv.clone(), 9).unwrap());
            for given in [0, 1, 9] {
                match cache.update(0, random(given), random(given), n) {
                    Err(KvError::Length { tokens, current: 9, seq_len, .. }) => {
                        assert_eq!((tokens, seq_len), (given, n))
                    }
                    other => panic!("{n}: {other:?}"),
                }
            }
            let no_layer = |error: KvError| assert!(matches!(error, KvError::Layer { layer, layers: 2 } if layer == n));
            no_layer(cache.update(n, random(1), random(1), 10).unwrap_err());
            no_layer(cache.get(n).unwrap_err());
            no_layer(cache.prefetch(n, n).unwrap_err());
            no_layer(cache.attend(n, &random(1), 0.3, true).unwrap_err());
            cache.prefetch(0, n).unwrap();
            assert_eq!((cache.seq_len(n), cache.seq_len(0)), (0, 9));
            // The same for an empty layer.
            cache.update(1, random(0), random(0), 0).unwrap();
            assert!(cache.update(1, random(1), random(1), n).is_err());
            assert_eq!((cache.get(0).unwrap().0.dims()[0], cache.get(1).unwrap().0.dims()[0]), (9, 0));
        }
    }
    let none = Tensor::zeros((1, 2, 0, 8), DType::F32, &Device::Cpu).unwrap();
    let mut cache = KVCache::new(20, 2, 2, 8, &Device::Cpu).unwrap();
    cache.update(0, none.clone(), none.clone(), 0).unwrap();
    assert!(cache.attend(0, &none, 0.3, true).is_err());
}

#[test]
fn memory_limits_the_blocks() {
    let of_a_block = 2 * 2 * 2 * 8 * 4 * 4; // layers, K and V, heads, dimensions, bytes, tokens
    let pool = |bytes| PagedKVPool::builder(SHAPE).blocks(8).block_size(4).memory_limit(bytes).build();
    assert_eq!(pool(3 * of_a_block + 1).unwrap().blocks_available(), 3);
    assert_eq!(pool(usize::MAX).unwrap().blocks_available(), 8);
    assert!(pool(of_a_block - 1).unwrap_err().to_string().contains(&format!("takes {of_a_block}")));
    let limit = |overflow| {
        let pool = PagedKVPool::builder(SHAPE).blocks(8).max_seq_len(20).overflow(overflow).build();
        pool.unwrap().length_limit()
    };
    assert_eq!(overflows().map(limit), [Some(20), None, None, None]);
}
