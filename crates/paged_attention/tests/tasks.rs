//! Sequences that are stepped by tasks of one rayon pool. A thread that waited inside rayon for the other threads of
//! its step would run another task meanwhile, which may write to the layer that the first task reads, and so wait for
//! itself.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use candle_core::DType;
use common::{Random, tensor};
use paged_attention::{Attention, BlockTable, KvCache, KvShape};
use rayon::prelude::*;

const SHAPE: KvShape = KvShape::new(1, 4, 32);
const HEADS: usize = 8;
const THREADS: usize = 8;
/// The number of groups of sequences. Groups are stepped concurrently.
const GROUPS: usize = 6;
const SEQUENCES: usize = 4;
const STEPS: usize = 30;

struct Sequence {
    id: usize,
    table: BlockTable,
    random: Random,
    /// The results of all its steps.
    attended: Vec<f32>,
}

impl Sequence {
    fn new(cache: &KvCache, id: usize) -> Self {
        Self { id, table: cache.table(), random: Random::new(id as u64 + 1), attended: vec![] }
    }

    /// Runs a step that is long enough to be divided among threads, and that copies a block because a fork uses it.
    fn step(&mut self, cache: &KvCache, tokens: usize) {
        let fork = self.table.fork();
        let mut step = cache.step();
        // The tokens differ from those of other sequences, so that no blocks are shared.
        step.push(&mut self.table, &vec![self.id as u32; tokens]).unwrap();
        let [q, k, v] = [HEADS, SHAPE.kv_heads, SHAPE.kv_heads].map(|heads| {
            let numbers = self.random.numbers(tokens * heads * SHAPE.head_dim);
            tensor(&numbers, heads, SHAPE.head_dim, DType::F32)
        });
        let attended = step.attend(0, &q, &k, &v, &Attention::scaled_by(SHAPE.head_dim)).unwrap();
        step.commit().unwrap();
        drop(fork);
        self.attended.extend(attended.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }
}

/// The number of tokens of each step.
fn steps() -> impl Iterator<Item = usize> {
    std::iter::once(500).chain([9; STEPS])
}

#[test]
fn tasks_do_not_wait_for_themselves() {
    let cache = || KvCache::builder(SHAPE).blocks(2000).block_size(16).build().unwrap();
    let (done, results) = mpsc::channel();
    let own = cache();
    thread::spawn(move || {
        let group = |group| (0..SEQUENCES).map(|i| Sequence::new(&own, group * SEQUENCES + i)).collect();
        let mut groups: Vec<Vec<Sequence>> = (0..GROUPS).map(group).collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build().unwrap();
        pool.install(|| {
            groups.par_iter_mut().with_max_len(1).for_each(|group| {
                for tokens in steps() {
                    group.par_iter_mut().with_max_len(1).for_each(|sequence| sequence.step(&own, tokens));
                }
            });
        });
        let _ = done.send(groups);
    });
    // Threads that wait for each other are left running.
    let together =
        results.recv_timeout(Duration::from_secs(300)).expect("the tasks do not end: a thread waits for itself");
    let cache = cache();
    for (id, together) in together.iter().flatten().enumerate() {
        let mut alone = Sequence::new(&cache, id);
        steps().for_each(|tokens| alone.step(&cache, tokens));
        assert_eq!(together.attended, alone.attended, "sequence {id}");
    }
}
