//! With a tier below the cache, every sequence gets the same answer as without: in small pools whose blocks are evicted to
//! the tier and read again, with windows, after a restart, and if the tier stalls.

#![allow(clippy::unwrap_used, clippy::panic)]

mod stand_in;

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};

use disk_tier::{DiskTier, Geometry, Namespace, OpenError, Options};
use inference::engine::{Outcome, Request, Settings, generate, generate_over};
use inference::sampling::Sampling;
use paged_attention::{
    KvCache, KvDtype, LayerGroup, OffloadOptions, PrefixKey, SaltFrom, StorageError, Tier, TierCursor, Window,
};
use stand_in::{END, HEAD_DIM, StandIn, mix};

const BLOCK_SIZE: usize = 4;

fn groups(windowed: bool) -> Vec<LayerGroup> {
    let [first, second] = [0, 1].map(|layer| LayerGroup::new([layer], 1, HEAD_DIM));
    if windowed { vec![first.window(Window::new(10)), second] } else { vec![LayerGroup::new([0, 1], 1, HEAD_DIM)] }
}

fn cache(windowed: bool, dtype: KvDtype, blocks: usize) -> KvCache {
    KvCache::builder_of(groups(windowed)).block_size(BLOCK_SIZE).dtype(dtype).blocks(blocks).build().unwrap()
}

fn open(path: &Path, cache: &KvCache) -> Arc<DiskTier> {
    let namespace = Namespace::new([("blocks", cache.block_identity().as_bytes())]);
    // Room for some of the blocks.
    let options = Options::new(4096 * 40);
    let geometry = Geometry::of(cache.pool());
    loop {
        // A thread whose sequence did not wait for it may still be reading a block.
        match DiskTier::open(path, &namespace, &geometry, &options) {
            Err(OpenError::HasWriter(_)) => std::thread::yield_now(),
            tier => return Arc::new(tier.unwrap()),
        }
    }
}

fn settings() -> Settings {
    Settings { max_batch: 4, step_tokens: 16, samples: 1, seed: 3, sampling: Sampling::new(1.0, 1.0).unwrap() }
}

/// Prompts of which many begin alike.
fn requests(seed: u64) -> Vec<Request> {
    (0..6u64)
        .map(|i| {
            let random = |n: u64, of: u32| (mix(seed * 10 + i, of) >> 20) % n;
            let text = |token: u64| (mix(random(2, 0), token as u32) % 4) as u32;
            let same = (0..random(60, 1)).map(text);
            let own = (0..1 + random(9, 2)).map(|at| (random(4, 3 + at as u32)) as u32);
            Request { prompt: same.chain(own).collect(), max_tokens: 1 + random(8, 50) as usize }
        })
        .collect()
}

fn answers(outcome: &Outcome) -> Vec<&[u32]> {
    outcome.answers.iter().map(|answer| &answer.tokens[..]).collect()
}

#[test]
fn answers_are_the_same_over_a_tier() {
    let (mut read, mut evicted) = (0, 0);
    for (windowed, dtype) in [false, true].into_iter().flat_map(|windowed| KvDtype::ALL.map(|dtype| (windowed, dtype)))
    {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tier");
        for seed in 0..12 {
            let requests = requests(seed);
            let alone = cache(windowed, dtype, 400);
            let expected = generate(&StandIn, &alone, &requests, &settings(), |token| token == END, |_| ()).unwrap();
            // Another process, over the same file.
            let small = cache(windowed, dtype, 24);
            let tier = open(&path, &small);
            let options = OffloadOptions::default().write_through(seed % 2 == 0);
            let offload = small.pool().offload_to(tier.clone(), &options).unwrap();
            for _ in 0..2 {
                let is_end = |token| token == END;
                let tier: Arc<dyn Tier> = tier.clone();
                let outcome =
                    generate_over(Some(tier), &StandIn, &small, &requests, &settings(), is_end, |_| ()).unwrap();
                assert_eq!(answers(&outcome), answers(&expected), "{dtype}, windows: {windowed}, seed {seed}");
                read += outcome.stats.read_from_tier.tokens;
            }
            drop(offload);
            evicted += small.pool().stats().evictions;
            assert_eq!((small.pool().in_use(), tier.stats().damaged), (0, 0));
        }
    }
    assert!(read > 1000 && evicted > 1000, "{read} tokens read, {evicted} blocks evicted");
}

/// A tier that seems to have everything, and whose loads wait until they are let go.
#[derive(Debug, Default)]
struct Stalls(Mutex<bool>, Condvar);

struct Cursor<'a>(&'a Stalls);

impl Tier for Stalls {
    fn cursor<'a>(&'a self, _: &PrefixKey) -> Box<dyn TierCursor + 'a> {
        Box::new(Cursor(self))
    }
}

impl TierCursor for Cursor<'_> {
    fn advance(&mut self, _: &[u32], _: &[SaltFrom]) {}

    fn contains(&self, _: usize) -> bool {
        true
    }

    fn load(&mut self, _: usize) -> Option<&[u8]> {
        drop(self.0.1.wait_while(self.0.0.lock().unwrap(), |goes| !*goes).unwrap());
        None
    }

    fn store(&mut self, _: usize, _: &[u8]) -> Result<bool, StorageError> {
        Ok(false)
    }
}

#[test]
fn a_tier_that_stalls_is_not_waited_for() {
    let requests = requests(1);
    let is_end = |token| token == END;
    let expected =
        generate(&StandIn, &cache(false, KvDtype::F32, 400), &requests, &settings(), is_end, |_| ()).unwrap();
    let tier = Arc::new(Stalls::default());
    let small = cache(false, KvDtype::F32, 30);
    let outcome = generate_over(Some(tier.clone()), &StandIn, &small, &requests, &settings(), is_end, |_| ()).unwrap();
    assert_eq!((answers(&outcome), outcome.stats.read_from_tier.tokens), (answers(&expected), 0));
    // The threads that still wait can end.
    *tier.0.lock().unwrap() = true;
    tier.1.notify_all();
}
