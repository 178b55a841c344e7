//! A model generates the same tokens with every cache.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::sync::LazyLock;
use std::thread;

use bitnet_kv::{KVCache, KvShape, Overflow, PagedKVPool};
use candle_core::Device;
use common::caches::{Concatenating, Paged, Replacing, Updated};
use common::counts;
use common::model::{DIM, KV_HEADS, LAYERS, Model};

const SHAPE: KvShape = KvShape::new(LAYERS, KV_HEADS, DIM);
const ANSWER: usize = 24;

static MODEL: LazyLock<Model> = LazyLock::new(|| Model::random(7));

fn prompt(of: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|at| (at * 37 + of * 101 + 5) % 512).collect()
}

fn pool(blocks: usize) -> PagedKVPool {
    PagedKVPool::builder(SHAPE).blocks(blocks).build().unwrap()
}

fn update(max_seq_len: usize) -> Updated {
    Updated(KVCache::new(max_seq_len, LAYERS, KV_HEADS, DIM, &Device::Cpu).unwrap())
}

#[test]
fn every_cache_generates_what_full_recomputation_does() {
    let prompt = prompt(0, 20);
    let expected = MODEL.recompute(&prompt, ANSWER);
    // A model that always generates the same token would prove nothing.
    assert!(expected.iter().collect::<std::collections::HashSet<_>>().len() > ANSWER / 2, "{expected:?}");
    assert_eq!(MODEL.generate(&prompt, 0, ANSWER, &mut Replacing::default()), expected);
    assert_eq!(MODEL.generate(&prompt, 0, ANSWER, &mut Concatenating::default()), expected);
    assert_eq!(MODEL.generate(&prompt, 0, ANSWER, &mut update(64)), expected);
    let pool = pool(8);
    let mut cache = Paged(pool.cache());
    assert_eq!(MODEL.generate(&prompt, 0, ANSWER, &mut cache), expected);
    // Again in the same cache, with the prompt token by token.
    cache.0.clear();
    for token in &prompt[..19] {
        MODEL.forward(&[*token], &mut cache).unwrap();
    }
    assert_eq!(MODEL.generate(&prompt, 19, ANSWER, &mut cache), expected);
    // Truncated to a part of the answer, and continued.
    cache.0.truncate(20 + 9).unwrap();
    let start: Vec<u32> = prompt.iter().chain(&expected[..10]).copied().collect();
    assert_eq!(MODEL.generate(&start, 29, ANSWER - 10, &mut cache), expected[10..]);
}

#[test]
fn a_matched_prefix_does_not_change_what_is_generated() {
    let pool = pool(16);
    let prompt = prompt(3, 40);
    let expected = MODEL.generate(&prompt, 0, ANSWER, &mut Concatenating::default());
    for matched in [0, 32, 32] {
        let mut cache = Paged(pool.cache());
        assert_eq!(cache.0.match_prefix(&prompt).unwrap(), matched);
        assert_eq!(MODEL.generate(&prompt, matched, ANSWER, &mut cache), expected);
    }
}

#[test]
fn growth_does_not_change_what_is_generated() {
    let prompt = prompt(4, 20);
    let expected = MODEL.generate(&prompt, 0, ANSWER, &mut Concatenating::default());
    let growing = PagedKVPool::builder(SHAPE).blocks(1).max_seq_len(16).overflow(Overflow::Grow).build().unwrap();
    let mut cache = Paged(growing.cache());
    assert_eq!(MODEL.generate(&prompt, 0, ANSWER, &mut cache), expected);
    assert_eq!((growing.stats().growth_events, counts(cache.0.blocks_in_use())), (1, [3, 0]));
    let mut updated = update(16);
    updated.0.enable_dynamic_growth();
    assert_eq!(MODEL.generate(&prompt, 0, ANSWER, &mut updated), expected);
}

#[test]
fn threads_that_share_a_pool_generate_what_each_does_alone() {
    let prompts: Vec<_> = (0..4).map(|of| prompt(of, 18)).collect();
    let alone: Vec<_> =
        prompts.iter().map(|prompt| MODEL.generate(prompt, 0, ANSWER, &mut Concatenating::default())).collect();
    let pool = pool(4 * 3);
    let together: Vec<Vec<Vec<u32>>> = thread::scope(|scope| {
        let one = |prompt: &Vec<u32>| {
            let (pool, prompt) = (pool.clone(), prompt.clone());
            scope.spawn(move || {
                let once = || MODEL.generate(&prompt, 0, ANSWER, &mut Paged(pool.cache()));
                vec![once(), once()]
            })
        };
        let threads: Vec<_> = prompts.iter().map(one).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (alone, together) in alone.iter().zip(together) {
        assert_eq!([alone.clone(), alone.clone()], together[..]);
    }
    assert_eq!(pool.blocks_in_use(), 0);
}

#[test]
fn old_tokens_in_8_bits_hardly_change_the_logits() {
    let prompt = prompt(5, 200);
    let mut exact = Concatenating::default();
    let pool = PagedKVPool::builder(SHAPE).blocks(16).compress_older_than(32).build().unwrap();
    let mut cache = Paged(pool.cache());
    let mut worst = 0f32;
    for chunk in prompt.chunks(20) {
        let (a, b) = (MODEL.forward(chunk, &mut exact).unwrap(), MODEL.forward(chunk, &mut cache).unwrap());
        let largest = a.iter().fold(0f32, |m, x| m.max(x.abs()));
        worst = a.iter().zip(&b).fold(worst, |m, (a, b)| m.max((a - b).abs() / largest));
    }
    assert!(worst > 0.0 && worst < 0.02, "{worst}");
    let stats = pool.stats();
    assert!(stats.saved_fraction() > 0.7, "{}", stats.saved_fraction());
    assert!(stats.key_error < 0.01 && stats.value_error < 0.01, "{stats:?}");
}
