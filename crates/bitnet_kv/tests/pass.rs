//! [`PagedKVCache::begin_pass`]: whatever a cache has, a pass computes what is missing, and the result is right.
//!
//! A substitute for a model gives each token keys and values that depend on all tokens up to it, as a model's do. So
//! the tests detect a row that was kept although a token before it has changed.
//!
//! - After a pass, every layer has the rows of all tokens, at their positions: after failures and other prompts, with
//!   rings, growth and 8-bit storage, and with other caches in the same pool.
//! - Tokens that the cache has, or that the pool has cached, are not computed again.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::sync::Arc;

use bitnet_kv::{
    CacheOptions, FetchLimits, KvDtype, KvError, KvShape, OffloadOptions, OutOfBlocks, Overflow, PagedKVCache,
    PagedKVPool, PagedKVPoolBuilder, Salt,
};
use candle_core::{Device, Tensor};
use common::caches::Paged;
use common::model::{DIM, KV_HEADS, LAYERS, Model};
use common::{Random, counts, numbers};
use disk_tier::{DiskTier, Geometry, Namespace, Options};

const SHAPE: KvShape = KvShape::new(3, 1, 4);

/// The number in the key of the last of these tokens. The value is its negative.
fn row(layer: usize, tokens: &[u32]) -> f32 {
    let hash =
        tokens.iter().fold(layer as u32 + 1, |hash, token| (hash ^ token).wrapping_mul(0x0100_0193).rotate_left(7));
    (hash >> 8) as f32 / (1 << 24) as f32 + 0.5
}

/// Computes tokens `from..to` in the first `layers` layers.
fn compute(cache: &mut PagedKVCache, tokens: &[u32], from: usize, to: usize, layers: usize) -> Result<(), KvError> {
    for layer in 0..layers {
        let rows: Vec<f32> = (from..to).flat_map(|at| [row(layer, &tokens[..=at]); 4]).collect();
        let rows = Tensor::from_vec(rows, (1, 1, to - from, 4), &Device::Cpu).unwrap();
        cache.layers_mut()[layer].append(&rows, &rows.neg().unwrap())?;
    }
    Ok(())
}

/// A pass over all layers. Returns how many tokens were computed.
fn pass(cache: &mut PagedKVCache, tokens: &[u32]) -> Result<usize, KvError> {
    let n = cache.begin_pass(tokens)?;
    compute(cache, tokens, n, tokens.len(), 3)?;
    Ok(tokens.len() - n)
}

/// Checks that all layers have these tokens; in a ring, those that the last token sees.
fn assert_holds(cache: &PagedKVCache, tokens: &[u32], ring: Option<(usize, usize)>, rounding: f32) {
    let last = tokens.len().saturating_sub(1);
    let sees = |at: usize| ring.is_none_or(|(sink_tokens, window)| at < sink_tokens || at + window > last);
    for (layer, of_cache) in cache.layers().iter().enumerate() {
        assert_eq!(of_cache.seq_len(), tokens.len());
        let expected: Vec<f32> =
            (0..tokens.len()).filter(|&at| sees(at)).map(|at| row(layer, &tokens[..=at])).collect();
        for (got, sign) in [(of_cache.keys().unwrap(), 1.0), (of_cache.values().unwrap(), -1.0)] {
            let got: Vec<f32> = numbers(&got).into_iter().step_by(4).map(|number| sign * number).collect();
            assert_eq!(got.len(), expected.len());
            let worst = got.iter().zip(&expected).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
            assert!(worst <= rounding, "layer {layer}: {got:?} for {expected:?}");
        }
    }
}

fn pool(blocks: usize) -> PagedKVPoolBuilder {
    PagedKVPool::builder(SHAPE).blocks(blocks).block_size(4)
}

#[test]
fn a_prompt_another_that_fails_and_the_first_again() {
    let first: Vec<u32> = (0..30).collect();
    let second: Vec<u32> = (0..20).chain(100..120).collect();
    for overflow in [Overflow::Error, Overflow::Circular { sink_tokens: 2 }, Overflow::Grow] {
        let max_seq_len = if matches!(overflow, Overflow::Circular { .. }) { 12 } else { 64 };
        let ring = (max_seq_len == 12).then_some((2, 10));
        let max_seq_len = if overflow == Overflow::Error { 80 } else { max_seq_len };
        let pool = pool(32).max_seq_len(max_seq_len).overflow(overflow).build().unwrap();
        let mut cache = pool.cache();
        assert_eq!(pass(&mut cache, &first).unwrap(), 30);
        // The prompt again: only its last token is computed, and no token is there twice.
        assert_eq!(pass(&mut cache, &first).unwrap(), 1);
        assert_holds(&cache, &first, ring, 0.0);
        // A pass over another prompt fails in its second layer.
        let n = cache.begin_pass(&second).unwrap();
        compute(&mut cache, &second, n, 40, 1).unwrap();
        // The pool has cached the full blocks of the first prompt.
        assert_eq!(pass(&mut cache, &first).unwrap(), 2, "{overflow:?}");
        assert_holds(&cache, &first, ring, 0.0);
        assert_eq!(pass(&mut cache, &second).unwrap(), 20, "{overflow:?}");
        assert_holds(&cache, &second, ring, 0.0);
        // An answer, token by token.
        let mut tokens = second.clone();
        for token in 200..230 {
            tokens.push(token);
            assert_eq!(pass(&mut cache, &tokens).unwrap(), 1);
            assert_holds(&cache, &tokens, ring, 0.0);
        }
    }
}

#[test]
fn what_other_caches_have_computed_is_matched() {
    let pool = pool(64).build().unwrap();
    let prompt: Vec<u32> = (0..40).collect();
    let mut alice = pool.cache();
    assert_eq!(pass(&mut alice, &prompt).unwrap(), 40);
    drop(alice);
    let mut bob = pool.cache();
    assert_eq!(pass(&mut bob, &prompt).unwrap(), 1);
    let longer: Vec<u32> = (0..40).chain(200..216).collect();
    assert_eq!(pass(&mut bob, &longer).unwrap(), 16);
    // Bob's cache has the first 12 tokens of another prompt; the pool has cached more of it.
    let carol: Vec<u32> = (0..12).chain(50..90).collect();
    assert_eq!(pass(&mut pool.cache(), &carol).unwrap(), 40);
    assert_eq!(pass(&mut bob, &carol).unwrap(), 1);
    assert_holds(&bob, &carol, None, 0.0);
    // What Bob's cache had before is still cached.
    assert_eq!(pass(&mut pool.cache(), &longer).unwrap(), 1);
}

#[test]
fn ids_of_the_next_tokens_stay_known_when_nothing_is_truncated() {
    let tokens: Vec<u32> = (0..33).collect();
    for cut in [0, 5, 33, 1000] {
        let pool = PagedKVPool::builder(SHAPE).blocks(16).build().unwrap();
        let mut cache = pool.cache();
        assert_eq!(cache.match_prefix(&tokens).unwrap(), 0);
        cache.truncate(cut).unwrap();
        cache.layers_mut()[1].clear();
        compute(&mut cache, &tokens, 0, 33, 3).unwrap();
        cache.truncate(33).unwrap();
        cache.note_tokens(&[33]);
        cache.truncate(33).unwrap();
        compute(&mut cache, &(0..34).collect::<Vec<_>>(), 33, 34, 3).unwrap();
        drop(cache);
        assert_eq!(pool.cache().match_prefix(&(0..40).collect::<Vec<_>>()).unwrap(), 32);
        // After `clear`, the ids are not known any more.
        let mut cache = pool.cache();
        cache.match_prefix(&[90, 91]).unwrap();
        cache.clear();
        compute(&mut cache, &(0..34).collect::<Vec<_>>(), 0, 34, 3).unwrap();
        drop(cache);
        assert_eq!(pool.cache().match_prefix(&(90..130).collect::<Vec<_>>()).unwrap(), 0);
    }
}

#[test]
fn a_full_pool_is_found_in_a_model_s_error_and_changes_nothing() {
    let pool = pool(4).build().unwrap();
    let mut cache = pool.cache();
    let tokens: Vec<u32> = (0..16).collect();
    pass(&mut cache, &tokens[..10]).unwrap();
    let more: Vec<u32> = (0..20).collect();
    let model = |cache: &mut PagedKVCache| -> candle_core::Result<usize> { Ok(pass(cache, &more)?) };
    let error = model(&mut cache).unwrap_err().context("layer 0");
    let full = OutOfBlocks { requested: 2, available: 1 };
    assert!(matches!(KvError::find(&error), Some(KvError::OutOfBlocks(found)) if *found == full), "{error}");
    // Inside a host's own error, in a box.
    let boxed: Box<dyn std::error::Error> = Box::new(Host(error));
    assert!(matches!(KvError::find(&*boxed), Some(KvError::OutOfBlocks(_))));
    assert!(KvError::find(&candle_core::Error::Msg("no room".into())).is_none());
    assert_eq!(pass(&mut cache, &tokens).unwrap(), 6);
    assert_holds(&cache, &tokens, None, 0.0);
}

#[derive(Debug)]
struct Host(candle_core::Error);

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the model failed")
    }
}

impl std::error::Error for Host {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

#[test]
fn a_batch_is_an_error_and_no_tokens_are_none_to_compute() {
    let mut cache = pool(8).build().unwrap().cache_with(&CacheOptions::default().batch(2));
    let error = cache.begin_pass(&[1, 2]).unwrap_err();
    assert!(matches!(error, KvError::Sequences(2)), "{error}");
    let mut cache = pool(8).build().unwrap().cache();
    assert_eq!(cache.begin_pass(&[]).unwrap(), 0);
    assert_eq!(pass(&mut cache, &[7]).unwrap(), 1);
    assert_eq!(pass(&mut cache, &[7]).unwrap(), 1);
    assert_eq!(cache.begin_pass(&[]).unwrap(), 0);
    assert_eq!((cache.seq_len(), counts(cache.blocks_in_use())), (0, [0, 0]));
}

/// A prompt of a few words, so that many prompts have a common prefix.
fn prompt(random: &mut Random) -> Vec<u32> {
    let mut tokens = vec![];
    for _ in 0..=random.below(8) {
        let (word, length) = (random.below(3) as u32, 1 + random.below(7) as u32);
        tokens.extend((0..length).map(|at| 10 * word + at));
    }
    tokens
}

#[test]
fn after_random_histories_caches_have_what_recomputation_gives() {
    let (mut kept, mut computed) = (0, 0);
    for seed in 0..400 {
        let random = &mut Random::new(seed);
        let overflow = [
            Overflow::Error,
            Overflow::Circular { sink_tokens: 3 },
            Overflow::Circular { sink_tokens: 0 },
            Overflow::Grow,
        ][seed as usize % 4];
        let ring = match overflow {
            Overflow::Circular { sink_tokens } => Some((sink_tokens, 14 - sink_tokens)),
            _ => None,
        };
        let compressed = ring.is_none() && random.below(3) == 0;
        let builder = pool(20 + random.below(20)).overflow(overflow).max_seq_len(if ring.is_some() { 14 } else { 500 });
        let builder = if compressed { builder.compress_older_than(9) } else { builder };
        let rounding = if compressed { 0.02 } else { 0.0 };
        let pool = builder.build().unwrap();
        let mut caches: Vec<PagedKVCache> = (0..3).map(|_| pool.cache()).collect();
        let mut tokens: Vec<Vec<u32>> = vec![vec![]; 3];
        for _ in 0..40 {
            let at = random.below(3);
            let cache = &mut caches[at];
            match random.below(10) {
                0 => *cache = pool.cache(),
                1 => cache.clear(),
                2 => drop(cache.truncate(random.below(30))),
                3 => cache.layers_mut()[random.below(3)].clear(),
                4 => {
                    // Tokens are appended without their ids.
                    cache.clear();
                    drop(compute(cache, &[77; 40], 0, 1 + random.below(5), 1 + random.below(3)));
                }
                5 => {
                    cache.note_tokens(&prompt(random));
                }
                6 => {
                    let tokens = prompt(random);
                    if let Ok(n) = cache.begin_pass(&tokens) {
                        drop(compute(cache, &tokens, n, tokens.len(), random.below(3)));
                    }
                }
                _ => {
                    let longer = random.below(2) == 0;
                    let mut wanted = if longer { tokens[at].clone() } else { vec![] };
                    wanted.extend(prompt(random));
                    match pass(cache, &wanted) {
                        Ok(new) => {
                            assert_holds(cache, &wanted, ring, rounding);
                            (kept, computed) = (kept + wanted.len() - new, computed + new);
                            if random.below(4) == 0 {
                                assert_eq!(
                                    pass(cache, &wanted).unwrap(),
                                    1,
                                    "{seed}: tokens of the cache are computed again"
                                );
                                assert_holds(cache, &wanted, ring, rounding);
                            }
                            if random.below(4) == 0 {
                                drop(compute(cache, &[77; 40], 0, 1 + random.below(3), 1 + random.below(3)));
                            }
                        }
                        Err(KvError::OutOfBlocks(_)) => drop(std::mem::replace(cache, pool.cache())),
                        Err(other) => panic!("{seed}: {other}"),
                    }
                    tokens[at] = wanted;
                }
            }
        }
        drop(caches);
        assert_eq!((pool.blocks_in_use(), pool.compressed_blocks_in_use()), (0, 0));
    }
    assert!(4 * kept > computed, "{kept} tokens kept, {computed} computed");
}

#[test]
fn a_model_generates_what_recomputation_does() {
    let model = Model::random(7);
    let shape = KvShape::new(LAYERS, KV_HEADS, DIM);
    let pool = PagedKVPool::builder(shape).blocks(16).build().unwrap();
    let prompts: [Vec<u32>; 2] = [
        (0..20).map(|at| at * 37 % 512).collect(),
        (0..12).map(|at| at * 37 % 512).chain((0..9).map(|at| at * 11 + 3)).collect(),
    ];
    let expected = prompts.each_ref().map(|prompt| model.recompute(prompt, 12));
    let mut cache = Paged(pool.cache());
    for which in [0, 0, 1, 0, 1, 1] {
        let mut tokens = prompts[which].clone();
        let mut logits = vec![];
        for step in 0..12 {
            let n = cache.0.begin_pass(&tokens).unwrap();
            assert!(step == 0 || n + 1 == tokens.len());
            logits = model.forward(&tokens[n..], &mut cache).unwrap();
            // A probe computes the last token again.
            if step == 0 {
                let n = cache.0.begin_pass(&tokens).unwrap();
                logits = model.forward(&tokens[n..], &mut cache).unwrap();
            }
            tokens.push(common::model::likeliest(&logits));
        }
        assert_eq!(tokens[prompts[which].len()..], expected[which], "{logits:?}");
    }
}

/// A pool over a tier in this file, and the file.
fn pool_over(file: &std::path::Path, builder: PagedKVPoolBuilder) -> PagedKVPool {
    let pool = builder.build().unwrap();
    let namespace = Namespace::new([("blocks", pool.block_identity().as_bytes())]);
    let geometry = Geometry { block_size: 4, bytes: vec![pool.bytes_per_block()] };
    let tier = DiskTier::open(file, &namespace, &geometry, &Options::new(1 << 20)).unwrap();
    let options = OffloadOptions::default().write_through(true);
    pool.use_tier(Arc::new(tier), &options, FetchLimits::default()).unwrap();
    pool
}

#[test]
fn a_tier_keeps_prefixes_for_the_next_pool() {
    let tokens: Vec<u32> = (0..30).collect();
    for (dtype, rounding) in [(KvDtype::F32, 0.0), (KvDtype::Int8, 0.02)] {
        let folder = tempfile::tempdir().unwrap();
        let builder = || PagedKVPool::builder(SHAPE).blocks(12).block_size(4).dtype(dtype);
        let open = || pool_over(&folder.path().join("tier"), builder());
        let pool = open();
        let salted = CacheOptions::default().salt(Salt::new(b"tenant"));
        // The second evicts blocks of the first.
        assert_eq!(pass(&mut pool.cache(), &tokens).unwrap(), 30);
        assert_eq!(pass(&mut pool.cache_with(&salted), &tokens).unwrap(), 30);
        drop(pool);
        let pool = open();
        let mut cache = pool.cache();
        assert_eq!(pass(&mut cache, &tokens).unwrap(), 2, "28 tokens are in whole blocks");
        assert_holds(&cache, &tokens, None, rounding);
        drop(cache);
        let other = CacheOptions::default().salt(Salt::new(b"other"));
        assert_eq!(pass(&mut pool.cache_with(&other), &tokens).unwrap(), 30);
        assert_eq!(pass(&mut pool.cache_with(&salted), &tokens).unwrap(), 2);
        pool.flush_offload();
        // Those of the other tenant.
        assert_eq!(pool.offload_stats().unwrap().stored, 7);
    }
    let grows = PagedKVPool::builder(SHAPE).overflow(Overflow::Grow).build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let geometry = Geometry { block_size: 16, bytes: vec![grows.bytes_per_block()] };
    let tier = DiskTier::open(folder.path().join("tier"), &Namespace::new([]), &geometry, &Options::new(1 << 20));
    let refused = grows.use_tier(Arc::new(tier.unwrap()), &OffloadOptions::default(), FetchLimits::default());
    assert!(matches!(refused, Err(KvError::Options(_))));
}
