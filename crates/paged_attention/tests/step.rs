//! Steps: what a commit keeps, what a failure leaves unchanged, and the errors for invalid input.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{DType, Device, Tensor};
use common::{Random, backends, tensor};
use paged_attention::{
    AttendError, Attention, Backend, BlockTable, CacheError, KvCache, KvDtype, KvShape, OutOfBlocks, PoolError,
    PushError, Step, find_error,
};

const SHAPE: KvShape = KvShape::new(2, 1, 4);

fn cache(blocks: usize) -> KvCache {
    KvCache::builder(SHAPE).blocks(blocks).block_size(4).build().unwrap()
}

fn rows(n: usize, seed: u64) -> Tensor {
    tensor(&Random::new(seed).numbers(n * 4), 1, 4, DType::F32)
}

/// Runs one step with all layers over one sequence.
fn forward(cache: &KvCache, table: &mut BlockTable, n: usize, seed: u64) {
    let mut step = cache.step();
    step.push(table, &vec![0; n]).unwrap();
    attend(&step, 0..SHAPE.layers, seed);
    step.commit().unwrap();
}

/// Attends in some layers of a step.
fn attend(step: &Step<'_>, layers: Range<usize>, seed: u64) {
    for layer in layers {
        let x = rows(step.tokens(), seed + layer as u64);
        step.attend(layer, &x, &x, &x, &Attention::new(1.0)).unwrap();
    }
}

/// The values of layer 1, as they are stored.
fn stored(cache: &KvCache, table: &BlockTable) -> Vec<Vec<Vec<f32>>> {
    cache.read(1, table, 0..table.len()).unwrap().1.to_vec3().unwrap()
}

#[test]
fn types_are_send_and_sync() {
    fn shared<T: Send + Sync>() {}
    shared::<paged_attention::BlockPool>();
    shared::<paged_attention::Sequences>();
    shared::<KvCache>();
    fn moved<T: Send>() {}
    moved::<paged_attention::BlockTable>();
    moved::<paged_attention::SwappedTable>();
    moved::<paged_attention::Step<'static>>();
}

#[test]
fn a_step_without_sequences_has_nothing_to_compute() {
    let cache = cache(1);
    let mut table = cache.table();
    let mut step = cache.step();
    assert!(matches!(step.push(&mut table, &[1; 5]), Err(PushError::OutOfBlocks(_))));
    for error in [
        step.token_ids(),
        step.positions(),
        step.attend(0, &rows(1, 1), &rows(1, 1), &rows(1, 1), &Attention::new(1.0)),
    ] {
        assert_eq!(find_error(&error.unwrap_err()), Some(&AttendError::EmptyStep));
    }
}

#[test]
fn a_step_packs_prefill_and_decode() {
    let cache = cache(16);
    let (mut a, mut b, mut c) = (cache.table(), cache.table(), cache.table());
    forward(&cache, &mut a, 6, 1);
    let mut step = cache.step();
    step.push(&mut a, &[7]).unwrap();
    step.push(&mut b, &[8, 9, 10]).unwrap();
    step.push(&mut c, &[11]).unwrap();
    assert_eq!((step.sequences(), step.tokens()), (3, 5));
    assert_eq!(step.token_ids().unwrap().to_vec1::<u32>().unwrap(), [7, 8, 9, 10, 11]);
    assert_eq!(step.positions().unwrap().to_vec1::<u32>().unwrap(), [6, 0, 1, 2, 0]);
    assert_eq!(step.logits_rows().unwrap().to_vec1::<u32>().unwrap(), [0, 3, 4]);
    attend(&step, 0..SHAPE.layers, 2);
    step.commit().unwrap();
    assert_eq!((a.len(), b.len(), c.len()), (7, 3, 1));
}

#[test]
fn a_dropped_step_rolls_every_sequence_back() {
    let cache = cache(8);
    let (mut a, mut b) = (cache.table(), cache.table());
    forward(&cache, &mut a, 5, 1);
    let (before, free) = (stored(&cache, &a), cache.pool().available());
    let mut step = cache.step();
    step.push(&mut a, &[1; 9]).unwrap();
    step.push(&mut b, &[1; 3]).unwrap();
    let x = rows(12, 9);
    step.attend(0, &x, &x, &x, &Attention::new(1.0)).unwrap();
    drop(step);
    assert_eq!((a.len(), b.len(), cache.pool().available()), (5, 0, free));
    assert_eq!(stored(&cache, &a), before);
    cache.pool().check_ref_counts([a.blocks(), b.blocks()]).unwrap();
}

#[test]
fn a_panic_during_a_step_leaks_no_block() {
    let cache = cache(8);
    let mut a = cache.table();
    forward(&cache, &mut a, 5, 1);
    let mut fork = a.fork();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let mut step = cache.step();
        step.push(&mut a, &[1; 9]).unwrap();
        step.push(&mut fork, &[1]).unwrap();
        let x = rows(10, 9);
        step.attend(0, &x, &x, &x, &Attention::new(1.0)).unwrap();
        panic!("layer 1 fails");
    }));
    assert!(panicked.is_err());
    assert_eq!((a.len(), fork.len()), (5, 5));
    cache.pool().check_ref_counts([a.blocks(), fork.blocks()]).unwrap();
    forward(&cache, &mut a, 4, 2);
    drop((a, fork));
    assert_eq!(cache.pool().available(), 8);
}

#[test]
fn a_full_pool_refuses_one_sequence_and_keeps_the_others() {
    let cache = cache(3);
    let (mut a, mut b) = (cache.table(), cache.table());
    let mut step = cache.step();
    step.push(&mut a, &[1; 8]).unwrap();
    match step.push(&mut b, &[1; 5]) {
        Err(PushError::OutOfBlocks(error)) => assert_eq!(error, OutOfBlocks { requested: 2, available: 1 }),
        other => panic!("{other:?}"),
    }
    assert_eq!(step.tokens(), 8);
    attend(&step, 0..SHAPE.layers, 3);
    step.commit().unwrap();
    assert_eq!((a.len(), b.len(), cache.pool().in_use()), (8, 0, 2));
}

#[test]
fn forks_share_until_one_of_them_writes() {
    for (name, configure) in backends() {
        let cache = configure(KvCache::builder(SHAPE).blocks(8).block_size(4)).build().unwrap();
        let mut a = cache.table();
        forward(&cache, &mut a, 6, 1);
        let mut b = a.fork();
        assert_eq!(cache.pool().in_use(), 2, "{name}");
        let before = stored(&cache, &a);
        forward(&cache, &mut b, 3, 5);
        assert_eq!(stored(&cache, &a), before, "{name}: the original is not written");
        assert_eq!(stored(&cache, &b)[..6], before, "{name}: the copy has what was written before");
        assert_eq!(stored(&cache, &b).len(), 9, "{name}");
        a.truncate(2).unwrap();
        forward(&cache, &mut a, 1, 6);
        assert_eq!(stored(&cache, &b)[..6], before, "{name}: truncating and writing copies too");
        assert_eq!(stored(&cache, &a)[..2], before[..2], "{name}");
    }
}

fn attend_error(step: &paged_attention::Step<'_>, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> String {
    let error = step.attend(layer, q, k, v, &Attention::new(1.0)).unwrap_err();
    error.to_string().lines().next().unwrap_or_default().to_string()
}

#[test]
fn invalid_tensors_are_errors_that_say_why() {
    for (name, configure) in backends() {
        let cache = configure(KvCache::builder(KvShape::new(2, 2, 4)).blocks(4)).build().unwrap();
        let mut table = cache.table();
        let mut step = cache.step();
        let t = |tokens: usize, heads: usize, dim: usize| {
            Tensor::zeros((tokens, heads, dim), DType::F32, &Device::Cpu).unwrap()
        };
        let (q, k) = (t(3, 4, 4), t(3, 2, 4));
        assert_eq!(attend_error(&step, 0, &q, &k, &k), "no sequence was pushed to the step");
        step.push(&mut table, &[1, 2, 3]).unwrap();
        let error = |layer, q: &Tensor, k: &Tensor, v: &Tensor| attend_error(&step, layer, q, k, v);
        assert_eq!(error(2, &q, &k, &k), "there is no layer 2: the cache has 2 layers", "{name}");
        assert_eq!(error(0, &t(2, 4, 4), &k, &k), "q has shape [2, 4, 4], expected (3 tokens, heads, 4 head_dim)");
        assert_eq!(error(0, &t(3, 0, 4), &k, &k), "q has shape [3, 0, 4], expected (3 tokens, heads, 4 head_dim)");
        assert_eq!(error(0, &t(3, 3, 4), &k, &k), "3 query heads are not a multiple of 2 key heads");
        assert_eq!(error(0, &q, &t(3, 2, 5), &k), "k has shape [3, 2, 5], expected (3 tokens, 2 kv_heads, 4 head_dim)");
        assert_eq!(
            error(0, &q, &k, &t(3, 4, 4)),
            "v has shape [3, 4, 4], expected (3 tokens, 2 kv_heads, 4 value_dim)"
        );
        let flat = q.flatten_all().unwrap();
        assert_eq!(error(0, &flat, &k, &k), "q has shape [48], expected (3 tokens, heads, 4 head_dim)");
        let half = k.to_dtype(DType::F16).unwrap();
        assert_eq!(error(0, &q, &half, &k), "k is f16, expected f32");
        let whole = q.to_dtype(DType::U32).unwrap();
        assert_eq!(error(0, &whole, &k, &k), "q is u32, expected f32, f16 or bf16");
        step.attend(0, &q, &k, &k, &Attention::new(1.0)).unwrap();
    }
}

#[test]
fn sequences_that_cannot_join_are_errors_that_say_why() {
    let (ours, theirs) = (cache(4), cache(4));
    let (mut empty, mut late, mut stranger) = (ours.table(), ours.table(), theirs.table());
    let mut a = ours.table();
    let mut step = ours.step();
    assert!(matches!(step.push(&mut empty, &[]), Err(PushError::NoTokens)));
    assert!(matches!(step.push(&mut stranger, &[1]), Err(PushError::ForeignTable)));
    step.push(&mut a, &[1]).unwrap();
    let x = rows(1, 1);
    step.attend(0, &x, &x, &x, &Attention::new(1.0)).unwrap();
    assert!(matches!(step.push(&mut late, &[1]), Err(PushError::Started)));
}

#[test]
fn impossible_caches_are_refused_with_the_numbers() {
    let build = |shape, blocks, block_size, dtype| {
        KvCache::builder(shape).blocks(blocks).block_size(block_size).dtype(dtype).build()
    };
    let message = |result: Result<KvCache, CacheError>| result.unwrap_err().to_string();
    assert!(matches!(build(SHAPE, 0, 4, KvDtype::F32), Err(CacheError::Pool(PoolError::NoBlocks))));
    assert!(matches!(build(SHAPE, 4, 0, KvDtype::F32), Err(CacheError::Pool(PoolError::EmptyBlocks))));
    assert!(matches!(build(SHAPE, usize::MAX, 2, KvDtype::F32), Err(CacheError::Pool(PoolError::TooLarge { .. }))));
    assert!(matches!(
        build(KvShape::new(2, 1, usize::MAX), 4, 4, KvDtype::F32),
        Err(CacheError::Pool(PoolError::OutOfMemory { .. }))
    ));
    assert_eq!(
        message(build(KvShape::new(2, 0, 4), 4, 4, KvDtype::F32)),
        "keys and values need at least one layer, head and dimension: 2 layers, 0 heads, keys of 4 and values of 4 \
         dimensions"
    );
    let error = KvDtype::try_from(DType::U8).unwrap_err();
    assert_eq!(error.to_string(), "keys and values cannot be stored as u8; use f32, f16 or bf16");
    let int8 = |head_dim, backend| {
        let shape = KvShape::new(2, 1, head_dim);
        KvCache::builder(shape).blocks(1).dtype(KvDtype::Int8).backend(backend).build()
    };
    assert!(int8(2048, Backend::Fused).is_ok());
    assert_eq!(
        message(int8(2049, Backend::Fused)),
        "heads of 2049 dimensions are too large for 8-bit storage, which takes at most 2048"
    );
    assert!(matches!(int8(64, Backend::Gather), Err(CacheError::Pool(PoolError::UnsupportedDType(_)))));
    let wide = KvShape::new(64, 64, 1024);
    assert_eq!(
        message(build(wide, 1 << 24, 16, KvDtype::F32)),
        "16777216 blocks of 536870912 bytes do not fit into this machine's memory"
    );
    let by_memory = |bytes| KvCache::builder(SHAPE).block_size(4).memory(bytes).build();
    assert_eq!(message(by_memory(255)), "255 bytes do not hold one block, which takes 256 bytes");
    assert_eq!(by_memory(1000).unwrap().pool().blocks(), 3);
    assert_eq!(by_memory(1000).unwrap().bytes_per_block(), 256);
    assert!(KvCache::builder(SHAPE).backend(Backend::Gather).build().is_ok());
}

#[test]
fn threads_step_their_own_sequences_on_one_cache() {
    fn shared<T: Send + Sync>(_: &T) {}
    let cache = cache(64);
    shared(&cache);
    shared(cache.pool());
    std::thread::scope(|scope| {
        for seed in 0..4u64 {
            let cache = &cache;
            scope.spawn(move || {
                for round in 0..50 {
                    let (mut table, mut expected) = (cache.table(), cache.table());
                    for i in 0..5 {
                        forward(cache, &mut table, 3, seed * 100 + round + i);
                    }
                    for i in 0..5 {
                        forward(cache, &mut expected, 3, seed * 100 + round + i);
                    }
                    assert_eq!(stored(cache, &table), stored(cache, &expected));
                }
            });
        }
    });
    assert_eq!(cache.pool().available(), 64);
}

/// A thread must take candle's read lock on a layer only once: a second one would wait for a writer that waits for the
/// first.
#[test]
fn queries_may_be_a_view_of_the_layer_while_other_threads_write() {
    let cache = cache(16);
    let (mut a, mut b) = (cache.table(), cache.table());
    forward(&cache, &mut a, 9, 1);
    let first = a.blocks()[0].index() * 2 * 4 * SHAPE.head_dim;
    let view = cache.tensor(0).unwrap().flatten_all().unwrap().narrow(0, first, 4).unwrap().reshape((1, 1, 4)).unwrap();
    let copy = view.copy().unwrap();
    let x = rows(1, 5);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for seed in 0..300 {
                forward(&cache, &mut b, 4, seed);
                b.truncate(0).unwrap();
            }
        });
        for _ in 0..300 {
            let mut step = cache.step();
            step.push(&mut a, &[3]).unwrap();
            let [of_view, of_copy] = [&view, &copy].map(|q| {
                let out = step.attend(0, q, &x, &x, &Attention::new(1.0)).unwrap();
                out.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            });
            assert_eq!(of_view, of_copy);
        }
    });
}
