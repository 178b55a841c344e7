//! Routers know what a tier has: what the events say is what the tier finds, while blocks are stored, leave and are found
//! after a restart.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use block_table::{BlockPool, BlockTable, FetchLimits, OffloadOptions, PrefixKey, Salt, TableOptions, Tier};
use disk_tier::{DiskTier, Geometry, Namespace, Options};
use kv_events::{Event, Medium, PublishedTier, Translator};

const BLOCK_SIZE: usize = 4;
const TEXTS: u32 = 6;
const BLOCKS: usize = 5;

fn tokens(text: u32) -> Vec<u32> {
    // Every second text begins like the one before.
    (0..(BLOCKS * BLOCK_SIZE) as u32).map(|at| if at < 6 { text / 2 } else { 100 * text + at }).collect()
}

fn salt(text: u32) -> Salt {
    if text < 4 { Salt::none() } else { Salt::new(b"tenant") }
}

fn open(path: &Path) -> Arc<DiskTier> {
    let geometry = Geometry { block_size: BLOCK_SIZE, bytes: vec![0] };
    Arc::new(DiskTier::open(path, &Namespace::new([]), &geometry, &Options::new(4096 * 13)).unwrap())
}

/// What a router knows.
#[derive(Default)]
struct Router {
    /// The parent and the tokens of each name that was ever told.
    contents: HashMap<u64, (Option<u64>, Vec<u32>)>,
    has: HashSet<u64>,
}

impl Router {
    fn apply(&mut self, events: Vec<Event>) {
        for event in events {
            match event {
                Event::BlockStored { block_hashes, parent_block_hash, token_ids, medium, .. } => {
                    let mut parent = parent_block_hash;
                    for (name, tokens) in block_hashes.into_iter().zip(token_ids.chunks(BLOCK_SIZE)) {
                        self.contents.insert(name, (parent, tokens.to_vec()));
                        assert!(medium == Medium::Gpu || self.has.insert(name), "stored twice");
                        parent = Some(name);
                    }
                }
                Event::BlockRemoved { medium: Medium::Gpu, .. } => {}
                Event::BlockRemoved { block_hashes, .. } => {
                    assert!(block_hashes.iter().all(|name| self.has.remove(name)), "it was not stored");
                }
                event => panic!("{event:?}"),
            }
        }
    }

    /// The tokens from the beginning of a sequence to the end of each block that the tier has.
    fn prefixes(&self) -> Vec<Vec<u32>> {
        let path = |name: &u64| {
            let mut path = Vec::new();
            let mut at = Some(*name);
            while let Some((before, tokens)) = at.map(|name| &self.contents[&name]) {
                path.splice(0..0, tokens.iter().copied());
                at = *before;
            }
            path
        };
        let mut all: Vec<_> = self.has.iter().map(path).collect();
        all.sort();
        all
    }
}

/// The same, as the tier itself finds them.
fn found(tier: &dyn Tier) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    for text in 0..TEXTS {
        let tokens = tokens(text);
        let mut cursor = tier.cursor(&PrefixKey::new().salt(salt(text)));
        for end in (BLOCK_SIZE..=tokens.len()).step_by(BLOCK_SIZE) {
            cursor.advance(&tokens[end - BLOCK_SIZE..end], &[]);
            if cursor.contains(0) {
                all.push(tokens[..end].to_vec());
            }
        }
    }
    all.sort();
    all.dedup();
    all
}

fn run(pool: &BlockPool, text: u32, blocks: usize) {
    let mut table = BlockTable::with_options(pool, &TableOptions::default().salt(salt(text)));
    let tokens = &tokens(text)[..blocks * BLOCK_SIZE];
    let had = table.match_prefix(tokens);
    table.reserve(tokens.len() - had).unwrap();
    table.commit_tokens(&tokens[had..]).unwrap();
}

#[test]
fn events_say_what_the_tier_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tier");
    let mut random = 1u64;
    let mut below = |n: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % n
    };
    for process in 0..3 {
        let pool = BlockPool::new(8, BLOCK_SIZE).unwrap();
        let tier = open(&path);
        let published = Arc::new(PublishedTier::new(tier.clone(), &pool, Medium::Storage).unwrap());
        assert!(PublishedTier::new(tier.clone(), &pool, Medium::Storage).is_none());
        let options = OffloadOptions::default().write_through(process == 1);
        let offload = pool.offload_to(published.clone(), &options).unwrap();
        let (mut events, mut translator) = (pool.subscribe(), Translator::of(&pool));
        let mut router = Router::default();
        // What was there before becomes known when it is read.
        for text in 0..TEXTS {
            let table = BlockTable::with_options(&pool, &TableOptions::default().salt(salt(text)));
            let more = [tokens(text), vec![0]].concat();
            table.fetch(&*published, &more, &FetchLimits::default());
        }
        router.apply(published.take().unwrap());
        if process > 0 {
            assert!(!router.has.is_empty());
        }
        for round in 0..200 {
            run(&pool, below(TEXTS.into()) as u32, 1 + below(BLOCKS as u64) as usize);
            offload.flush();
            router.apply(translator.translate(events.try_iter()));
            router.apply(published.take().unwrap());
            if process == 0 {
                assert_eq!(router.prefixes(), found(&*tier), "round {round}");
            }
            // The others may have blocks whose beginning has left, which nobody has read.
            assert!(router.prefixes().iter().all(|prefix| found(&*tier).contains(prefix)), "round {round}");
            if round % 50 == 0 {
                let mut again = Router { contents: router.contents.clone(), ..Router::default() };
                again.apply(published.all());
                assert_eq!(again.prefixes(), router.prefixes());
            }
        }
        assert!(tier.stats().evicted > 50);
    }
}
