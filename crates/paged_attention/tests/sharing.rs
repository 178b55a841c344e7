//! Prefix matching, partial commits, swapping, metrics and poisoning, through a cache and its steps.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use common::{backends, tensor};
use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use paged_attention::{BlockTable, CommitError, KvCache, KvDtype, KvShape, Step};

const SHAPE: KvShape = KvShape::new(2, 2, 8);

/// Writes keys and values that depend on the tokens only.
fn write(step: &Step<'_>) -> candle_core::Result<()> {
    let tokens: Vec<u32> = step.token_ids()?.to_vec1()?;
    let numbers: Vec<f32> = tokens.iter().flat_map(|&token| (0..16).map(move |i| (token * 16 + i) as f32)).collect();
    let k = tensor(&numbers, 2, 8, DType::F32);
    for layer in 0..SHAPE.layers {
        step.write(layer, &k, &(&k * (layer + 2) as f64)?)?;
    }
    Ok(())
}

fn append(cache: &KvCache, table: &mut BlockTable, tokens: &[u32]) {
    let mut step = cache.step();
    step.push(table, tokens).unwrap();
    write(&step).unwrap();
    step.commit().unwrap();
}

/// Asserts that the table has the keys and values that `write` writes for these tokens.
fn assert_holds(cache: &KvCache, table: &BlockTable, tokens: &[u32]) {
    let numbers: Vec<f32> = tokens.iter().flat_map(|&token| (0..16).map(move |i| (token * 16 + i) as f32)).collect();
    let expected = tensor(&numbers, 2, 8, cache.dtype().tensor_dtype());
    for layer in 0..SHAPE.layers {
        let (k, v) = cache.read(layer, table, 0..table.len()).unwrap();
        let same = |a: &Tensor, b: &Tensor| {
            let bits = |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(a), bits(b));
        };
        same(&k, &expected);
        same(
            &v,
            &tensor(&numbers, 2, 8, DType::F32)
                .affine((layer + 2) as f64, 0.)
                .unwrap()
                .to_dtype(cache.dtype().tensor_dtype())
                .unwrap(),
        );
    }
}

#[test]
fn only_committed_tokens_can_be_matched() {
    let cache = KvCache::builder(SHAPE).blocks(16).block_size(4).build().unwrap();
    let prompt: Vec<u32> = (1..10).collect();
    let matched = || cache.table().match_prefix(&prompt);
    let mut table = cache.table();
    let mut step = cache.step();
    step.push(&mut table, &prompt).unwrap();
    assert_eq!(matched(), 0, "pushed, not written");
    write(&step).unwrap();
    assert_eq!(matched(), 0, "written, not committed");
    drop(step);
    assert_eq!((matched(), cache.pool().evictable()), (0, 0), "rolled back");
    let mut step = cache.step();
    step.push(&mut table, &prompt).unwrap();
    let failing = Tensor::zeros((9, 2, 8), DType::F32, cache.device()).unwrap();
    assert!(step.write(7, &failing, &failing).is_err());
    drop(step);
    assert_eq!(matched(), 0, "failed");
    append(&cache, &mut table, &prompt);
    assert_eq!(matched(), 8);
    drop(table);
    assert_eq!((matched(), cache.pool().evictable()), (8, 2));
}

#[test]
fn a_matched_prefix_equals_what_would_have_been_computed() {
    for (name, configure) in backends() {
        let cache = configure(KvCache::builder(SHAPE).blocks(16).block_size(4)).build().unwrap();
        append(&cache, &mut cache.table(), &[1, 2, 3, 4, 5, 6, 7, 8]);
        let mut table = cache.table();
        let prompt = [1, 2, 3, 4, 5, 6, 70, 80, 90];
        assert_eq!(table.match_prefix(&prompt), 6, "{name}");
        append(&cache, &mut table, &prompt[6..]);
        assert_holds(&cache, &table, &prompt);
        let mut table = cache.table();
        assert_eq!(table.match_prefix(&[1, 2, 3, 4, 5, 6, 7, 8, 9]), 8);
        assert_holds(&cache, &table, &[1, 2, 3, 4, 5, 6, 7, 8]);
    }
}

#[test]
fn some_of_the_drafted_tokens_can_be_accepted() {
    let cache = KvCache::builder(SHAPE).blocks(16).block_size(4).build().unwrap();
    let (mut a, mut b) = (cache.table(), cache.table());
    let mut step = cache.step();
    step.push(&mut a, &[1, 2, 3, 4, 5, 6]).unwrap();
    step.push(&mut b, &[7, 8, 9]).unwrap();
    write(&step).unwrap();
    step.commit_accepted(&[5, 0]).unwrap();
    assert_eq!((a.len(), b.len(), cache.pool().in_use()), (5, 0, 2));
    assert_holds(&cache, &a, &[1, 2, 3, 4, 5]);
    append(&cache, &mut a, &[60]);
    assert_holds(&cache, &a, &[1, 2, 3, 4, 5, 60]);

    let mut step = cache.step();
    step.push(&mut a, &[7, 8]).unwrap();
    step.push(&mut b, &[7]).unwrap();
    assert_eq!(step.commit_accepted(&[1]).unwrap_err(), CommitError::Sequences { accepted: 1, pushed: 2 });
    let mut step = cache.step();
    step.push(&mut a, &[7, 8]).unwrap();
    step.push(&mut b, &[7]).unwrap();
    let error = step.commit_accepted(&[1, 2]).unwrap_err();
    assert_eq!(error, CommitError::Tokens { sequence: 1, accepted: 2, pushed: 1 });
    assert_eq!((a.len(), b.len(), cache.pool().in_use()), (6, 0, 2));
}

#[test]
fn a_sequence_is_swapped_out_and_in_byte_for_byte() {
    for (name, configure) in backends() {
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
            let builder = KvCache::builder(SHAPE).blocks(4).block_size(4).dtype(dtype);
            let cache = configure(builder).build().unwrap();
            let mut table = cache.table();
            let tokens: Vec<u32> = (1..11).collect();
            append(&cache, &mut table, &tokens);
            let swapped = table.swap_out().unwrap();
            assert_eq!((cache.pool().in_use(), swapped.bytes()), (0, 3 * cache.bytes_per_block()), "{name}");
            append(&cache, &mut cache.table(), &[99; 16]); // overwrites all blocks
            let mut back = swapped.swap_in().unwrap();
            assert_holds(&cache, &back, &tokens);
            append(&cache, &mut back, &[11]);
            assert_holds(&cache, &back, &(1..12).collect::<Vec<_>>());
        }
    }
}

#[test]
fn int8_blocks_are_copied_and_swapped_with_their_scales() {
    let cache = KvCache::builder(SHAPE).blocks(5).block_size(4).dtype(KvDtype::Int8).build().unwrap();
    let read = |table: &BlockTable| {
        let (k, v) = cache.read(1, table, 0..table.len()).unwrap();
        [k, v].map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap())
    };
    let mut table = cache.table();
    append(&cache, &mut table, &[1, 2, 3, 4, 5, 6]);
    let before = read(&table);
    let mut fork = table.fork();
    append(&cache, &mut fork, &[7]); // in a copy of the last block
    assert_eq!(read(&fork).map(|numbers| numbers[..before[0].len()].to_vec()), before);
    drop(fork);
    let swapped = table.swap_out().unwrap();
    append(&cache, &mut cache.table(), &[99; 20]); // overwrites all blocks
    assert_eq!(read(&swapped.swap_in().unwrap()), before);
}

#[test]
fn a_metrics_recorder_gets_the_numbers_of_the_pool() {
    let recorder = DebuggingRecorder::new();
    metrics::with_local_recorder(&recorder, || {
        let cache = KvCache::builder(SHAPE).blocks(4).block_size(4).name("draft").build().unwrap();
        append(&cache, &mut cache.table(), &[1, 2, 3, 4, 5]);
        let mut table = cache.table();
        assert_eq!(table.match_prefix(&[1, 2, 3, 9]), 3);
        append(&cache, &mut table, &[9]); // in a copy
        drop(cache.pool().allocate(3).unwrap()); // the original is evicted
        let mut other = cache.table();
        append(&cache, &mut other, &[7]);
    });
    let found: HashMap<String, DebugValue> = recorder
        .snapshotter()
        .snapshot()
        .into_vec()
        .into_iter()
        .map(|(key, _, _, value)| {
            let labels: Vec<_> = key.key().labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
            (format!("{} {}", key.key().name(), labels.join(" ")), value)
        })
        .collect();
    for (state, blocks) in [("free", 2.0), ("in_use", 2.0), ("evictable", 0.0)] {
        let gauge = &found[&format!("kv_cache_blocks cache=draft state={state}")];
        assert_eq!(*gauge, DebugValue::Gauge(blocks.into()), "{state}");
    }
    for (name, count) in [("queried_tokens", 3), ("hit_tokens", 3), ("evictions", 1), ("copies", 1)] {
        let counter = &found[&format!("kv_cache_{name} cache=draft")];
        assert_eq!(*counter, DebugValue::Counter(count), "{name}");
    }
}

#[test]
fn free_blocks_are_poisoned_on_request() {
    for (name, configure) in backends() {
        for poison in [true, false] {
            let cache = configure(KvCache::builder(SHAPE).blocks(2).block_size(4).poison(poison)).build().unwrap();
            append(&cache, &mut cache.table(), &[1, 2, 3]);
            // Reserved and never written, so a read returns what was left in the block.
            let mut reader = cache.table();
            reader.append(3).unwrap();
            let (k, _) = cache.read(1, &reader, 0..reader.len()).unwrap();
            let k: Vec<f32> = k.flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(k.iter().all(|x| x.is_nan()), poison, "{name}");
        }
    }
}
