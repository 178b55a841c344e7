//! NVIDIA Dynamo's router follows two engines: what it knows of them is what their pools say.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::{Duration, Instant};

use block_table::Salt;
use router_tests::{BLOCK_SIZE, Engine, Follower, Index};

/// When nothing has come for so long, probably nothing is on its way.
const SILENCE: Duration = Duration::from_millis(100);
/// The same, where it has to be so.
const LONG_SILENCE: Duration = Duration::from_millis(500);
/// How long the index may differ.
const PATIENCE: Duration = Duration::from_secs(20);

/// Two engines, and a router that follows them.
struct Cluster {
    engines: [Engine; 2],
    followers: [Follower; 2],
    index: Index,
}

impl Cluster {
    async fn start(blocks: [usize; 2], buffered_batches: usize) -> Self {
        let engines = blocks.map(|blocks| Engine::start(blocks, buffered_batches).unwrap());
        let followers = [
            Follower::connect(0, engines[0].publisher()).await.unwrap(),
            Follower::connect(1, engines[1].publisher()).await.unwrap(),
        ];
        Self { engines, followers, index: Index::default() }
    }

    /// How many blocks of a prompt each engine has: by its pool, and by the router's index.
    fn blocks(&self, prompt: &[u32]) -> ([usize; 2], [usize; 2]) {
        let found = self.index.blocks(prompt, None);
        let pools = self.engines.each_ref().map(|engine| engine.cached_blocks(prompt, Salt::none()));
        (pools, [0, 1].map(|engine| found.get(&engine).copied().unwrap_or(0)))
    }

    /// The first of the prompts for which the index is not what the pools say.
    fn difference<'a>(&self, prompts: &'a [Vec<u32>]) -> Option<(&'a [u32], [usize; 2], [usize; 2])> {
        prompts.iter().find_map(|prompt| {
            let (pools, index) = self.blocks(prompt);
            (pools != index).then_some((&prompt[..], pools, index))
        })
    }

    /// Follows both engines until the index is what the pools say, and stays so. `Ask::First` is how a router starts:
    /// the first batches may have been published before the subscription arrived.
    async fn assert_follows(&mut self, prompts: &[Vec<u32>], ask: Ask) {
        let begin = Instant::now();
        let mut equal = 0;
        while equal < 2 && begin.elapsed() < PATIENCE {
            for follower in &mut self.followers {
                if ask == Ask::First {
                    follower.catch_up(&mut self.index).await.unwrap();
                }
                follower.follow(&mut self.index, SILENCE).await.unwrap();
            }
            equal = if self.difference(prompts).is_none() { equal + 1 } else { 0 };
        }
        assert_eq!(self.difference(prompts), None);
    }
}

/// When a router asks for a replay.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// At first, and when sequence numbers are missing.
    First,
    /// When sequence numbers are missing.
    AtGaps,
}

/// Random numbers that are the same every time (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % n as u64) as usize
    }
}

/// Prompts that begin with parts of some documents, and go on with tokens of their own.
fn prompts(n: usize, random: &mut Random) -> Vec<Vec<u32>> {
    let document = |number: u32| (0..20 * BLOCK_SIZE as u32).map(move |token| 1000 * (number + 1) + token);
    (0..n)
        .map(|i| {
            let common = document(random.below(40) as u32).take(random.below(20 * BLOCK_SIZE + 1));
            let own = 1 + random.below(3 * BLOCK_SIZE) as u32;
            common.chain((0..own).map(|token| 100_000 + 100 * i as u32 + token)).collect()
        })
        .collect()
}

#[tokio::test]
async fn the_engine_with_the_longest_prefix_is_found() {
    let mut random = Random(1);
    let mut cluster = Cluster::start([4096, 4096], 10_000).await;
    let prompts = prompts(200, &mut random);
    for prompt in &prompts {
        // A part of each prompt on the first engine, on the second, on both, or on none.
        let at = random.below(4);
        for (engine, of) in cluster.engines.iter().zip([[0, 2], [1, 2]]) {
            if of.contains(&at) {
                engine.compute(&prompt[..1 + random.below(prompt.len())], Salt::none()).unwrap();
            }
        }
    }
    cluster.assert_follows(&prompts, Ask::First).await;
    // All cases occur: the first engine has more, the second, both the same, none at all.
    let counts: Vec<[usize; 2]> = prompts.iter().map(|prompt| cluster.blocks(prompt).0).collect();
    let count = |case: fn(&[usize; 2]) -> bool| counts.iter().filter(|counts| case(counts)).count();
    let cases =
        [count(|[a, b]| a > b), count(|[a, b]| a < b), count(|[a, b]| a == b && *a > 0), count(|n| *n == [0, 0])];
    assert!(cases.iter().all(|&count| count >= 5), "{cases:?}");
}

#[tokio::test]
async fn evictions_and_resets_are_followed() {
    let mut random = Random(2);
    // The first pool has room for two or three prompts only.
    let mut cluster = Cluster::start([50, 4096], 10_000).await;
    let prompts = prompts(60, &mut random);
    for (i, prompt) in prompts.iter().enumerate() {
        for engine in &cluster.engines {
            engine.compute(prompt, Salt::none()).unwrap();
        }
        if i % 15 == 14 {
            cluster.assert_follows(&prompts, Ask::First).await;
        }
    }
    assert!(cluster.engines[0].evictions() > 100 && cluster.engines[1].evictions() == 0);
    let (before, _) = cluster.blocks(&prompts[0]);
    assert!(before[0] < before[1], "{before:?}");

    cluster.engines[1].reset();
    cluster.engines[1].compute(&prompts[1], Salt::none()).unwrap();
    cluster.assert_follows(&prompts, Ask::First).await;
    assert_eq!(cluster.engines[1].cached_blocks(&prompts[1], Salt::none()), prompts[1].len() / BLOCK_SIZE);
}

#[tokio::test]
async fn lost_messages_are_replayed() {
    let mut random = Random(3);
    let mut cluster = Cluster::start([60, 60], 10_000).await;
    let prompts = prompts(60, &mut random);
    let (first, rest) = prompts.split_at(20);
    let (lost, later) = rest.split_at(20);
    let compute = |cluster: &Cluster, prompts: &[Vec<u32>]| {
        for prompt in prompts {
            cluster.engines.iter().for_each(|engine| engine.compute(prompt, Salt::none()).unwrap());
        }
    };
    compute(&cluster, first);
    cluster.assert_follows(&prompts, Ask::First).await;

    compute(&cluster, lost);
    for follower in &mut cluster.followers {
        assert!(follower.lose(LONG_SILENCE).await.unwrap() > 0);
        follower.replayed = 0;
    }
    // The router is wrong now, and would stay so.
    assert!(cluster.difference(&prompts).is_some());

    // It learns of the gap from the sequence numbers only.
    compute(&cluster, later);
    cluster.assert_follows(&prompts, Ask::AtGaps).await;
    assert!(cluster.followers.iter().all(|follower| follower.replayed > 0));
}

#[tokio::test]
async fn what_cannot_be_replayed_is_published_again() {
    let mut random = Random(4);
    // Two batches are kept. What was cached, removed and cleared before is not in them.
    let mut cluster = Cluster::start([60, 60], 2).await;
    let prompts = prompts(40, &mut random);
    let (first, rest) = prompts.split_at(20);
    for part in [first, rest] {
        for prompt in part {
            for engine in &cluster.engines {
                engine.compute(prompt, Salt::none()).unwrap();
                // A batch of its own.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        for follower in &mut cluster.followers {
            assert!(follower.lose(LONG_SILENCE).await.unwrap() > 2);
        }
        cluster.assert_follows(&prompts, Ask::First).await;
    }
}

#[tokio::test]
async fn salts_are_namespaces() {
    let mut cluster = Cluster::start([100, 100], 10_000).await;
    let prompt: Vec<u32> = (0..5 * BLOCK_SIZE as u32).collect();
    // This is how the router knows a salt from the name of an adapter or the hash of an image.
    let salt = || Salt::new(b"dynamo-cache-salt:tenant");
    cluster.engines[0].compute(&prompt, salt()).unwrap();
    cluster.engines[1].compute(&prompt[..2 * BLOCK_SIZE], Salt::none()).unwrap();
    cluster.assert_follows(std::slice::from_ref(&prompt), Ask::First).await;
    assert_eq!((cluster.engines[0].cached_blocks(&prompt, salt()), cluster.blocks(&prompt).0), (5, [0, 2]));
    assert_eq!(cluster.index.blocks(&prompt, Some("tenant")), [(0, 5)].into());
    assert_eq!(cluster.index.blocks(&prompt, None), [(1, 2)].into());
    assert_eq!(cluster.index.blocks(&prompt, Some("another")), [].into());
}

#[tokio::test]
async fn what_is_on_a_disk_is_followed() {
    let mut random = Random(5);
    let folder = tempfile::tempdir().unwrap();
    // Of the second, blocks leave.
    let engines = [1000, 90].map(|room| Engine::start_over(&folder.path().join(room.to_string()), room, 50).unwrap());
    let followers = [
        Follower::connect(0, engines[0].publisher()).await.unwrap(),
        Follower::connect(1, engines[1].publisher()).await.unwrap(),
    ];
    let mut cluster = Cluster { engines, followers, index: Index::default() };
    let prompts = prompts(40, &mut random);
    let of_disk = |cluster: &Cluster, prompt: &[u32]| {
        let files = cluster.engines.each_ref().map(|engine| engine.blocks_on_disk(prompt));
        (files, [0, 1].map(|engine| cluster.index.blocks_on_disk(prompt, engine)))
    };
    let assert_disk = async |cluster: &mut Cluster| {
        let begin = Instant::now();
        loop {
            cluster.assert_follows(&prompts, Ask::First).await;
            let difference = prompts.iter().map(|prompt| of_disk(cluster, prompt)).find(|(file, index)| file != index);
            match difference {
                None => return,
                Some(of) => assert!(begin.elapsed() < PATIENCE, "{of:?}"),
            }
        }
    };
    for (i, prompt) in prompts.iter().enumerate() {
        cluster.engines.iter().for_each(|engine| engine.compute(prompt, Salt::none()).unwrap());
        if i % 10 == 9 {
            assert_disk(&mut cluster).await;
        }
    }
    // All cases occur: on the disk and not in the pool, left the disk.
    let ([all, some], _) = of_disk(&cluster, &prompts[0]);
    let (pools, _) = cluster.blocks(&prompts[0]);
    assert!(all == prompts[0].len() / BLOCK_SIZE && some < all && pools[0] < all, "{all}, {some}, {pools:?}");
    // The pool forgets, and the file does not.
    cluster.engines[0].reset();
    assert_disk(&mut cluster).await;
    assert_eq!(cluster.index.blocks_on_disk(&prompts[0], 0), all);
}
