//! Caches whose layers attend in tasks of one thread pool, where a thread that waits during one layer's attention runs
//! another task meanwhile, which may use the same cache. And layers that are written while other layers are read.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use bitnet_kv::{KvError, KvShape, Overflow, PagedKVCache, PagedKVPool};
use candle_core::{Device, Tensor};
use common::{Random, RandomTensor, counts, dense, difference, numbers, tokens};
use rayon::prelude::*;

const SCALE: f32 = 0.2;
const SHAPE: KvShape = KvShape::new(4, 2, 32);
const TOKENS: usize = 500;
const CACHES: usize = 4;
const ROUNDS: usize = 600;

/// A cache, the keys and values of its layers, and queries for it.
struct Filled {
    cache: PagedKVCache,
    of: Vec<(Tensor, Tensor)>,
    q: Tensor,
}

impl Filled {
    fn new(pool: &PagedKVPool, random: &mut Random) -> Self {
        let dims = [1, SHAPE.kv_heads, TOKENS, SHAPE.head_dim];
        let of: Vec<_> = (0..SHAPE.layers).map(|_| (random.tensor(&dims), random.tensor(&dims))).collect();
        let mut cache = pool.cache();
        for (layer, (k, v)) in cache.layers_mut().iter_mut().zip(&of) {
            layer.append(k, v).unwrap();
        }
        Self { cache, of, q: random.tensor(&[1, 8, 10, SHAPE.head_dim]) }
    }

    /// Reads the cache's numbers, or attends with one of its layers, depending on the task's number.
    fn run(&self, task: usize) -> Option<(usize, Vec<f32>)> {
        let layer = task % SHAPE.layers;
        match (task + task / SHAPE.layers) % 4 {
            0 => {
                assert_eq!((self.cache.seq_len(), self.cache.layers()[layer].seq_len()), (TOKENS, TOKENS));
                None
            }
            1 => {
                assert_eq!(counts(self.cache.blocks_in_use()), [TOKENS.div_ceil(16), 0]);
                assert!(self.cache.bytes_in_use() > 0);
                None
            }
            _ => Some((layer, numbers(&self.cache.layers()[layer].attend(&self.q, SCALE, true).unwrap()))),
        }
    }
}

#[test]
fn no_call_waits_for_a_layer_that_attends() {
    let mut random = Random::new(1);
    let pool = PagedKVPool::builder(SHAPE).blocks(CACHES * TOKENS.div_ceil(16)).build().unwrap();
    let caches: Arc<Vec<Filled>> = Arc::new((0..CACHES).map(|_| Filled::new(&pool, &mut random)).collect());
    let (done, results) = mpsc::channel();
    let own = caches.clone();
    thread::spawn(move || {
        let threads = rayon::ThreadPoolBuilder::new().num_threads(8).build().unwrap();
        // Idle threads help the threads that attend, and these run other tasks while they wait for the helpers.
        let round = |filled: &Filled, round: usize| -> Vec<_> {
            let tasks = (0..SHAPE.layers).into_par_iter().with_max_len(1);
            tasks.filter_map(|task| filled.run(round * SHAPE.layers + task)).collect()
        };
        let all = |filled: &Filled| -> Vec<_> { (0..ROUNDS).flat_map(|i| round(filled, i)).collect() };
        let seen: Vec<Vec<_>> = threads.install(|| own.par_iter().with_max_len(1).map(all).collect());
        let _ = done.send(seen);
    });
    // If threads wait for each other, the test fails after the timeout, and the threads are left running.
    let seen = results.recv_timeout(Duration::from_secs(300)).expect("no thread waits for itself");
    let dense = |Filled { of, q, .. }: &Filled| -> Vec<_> {
        of.iter().map(|(k, v)| dense(q, k, v, f64::from(SCALE), |at, seen| seen <= at)).collect()
    };
    let expected: Vec<_> = caches.iter().map(dense).collect();
    for (seen, expected) in seen.iter().zip(&expected) {
        assert_eq!(seen.len(), ROUNDS * SHAPE.layers / 2);
        for (layer, got) in seen {
            let got = Tensor::new(got.as_slice(), &Device::Cpu).unwrap();
            assert!(difference(&got, &expected[*layer]) < 1e-5);
        }
    }
}

#[test]
fn a_layer_is_written_between_reads_of_another() {
    let mut random = Random::new(2);
    for (overflow, len) in [(Overflow::Error, TOKENS), (Overflow::Circular { sink_tokens: 32 }, 100)] {
        let pool = PagedKVPool::builder(SHAPE).blocks(128).max_seq_len(len).overflow(overflow).build();
        // In a ring whose window has freed blocks, a layer that was cleared has slots only for the sink tokens.
        let (pool, most) = (pool.unwrap(), if overflow == Overflow::Error { TOKENS } else { 32 });
        let Filled { mut cache, of, q } = Filled::new(&pool, &mut random);
        if overflow != Overflow::Error {
            for (layer, (k, v)) in cache.layers_mut().iter_mut().zip(&of) {
                layer.append(&tokens(k, 0..30), &tokens(v, 0..30)).unwrap();
            }
        }
        let blocks = counts(cache.blocks_in_use());
        let (read, written) = cache.layers_mut().split_at_mut(1);
        let (read, written) = (&read[0], &mut written[0]);
        let attended = || numbers(&read.attend(&q, SCALE, true).unwrap());
        let before = attended();
        thread::scope(|scope| {
            let (k, v) = &of[2];
            let writer = scope.spawn(move || {
                for round in 0..300 {
                    written.clear();
                    let new = |t| tokens(t, 0..1 + round % most);
                    while let Err(error) = written.append(&new(k), &new(v)) {
                        assert!(matches!(error, KvError::Busy), "{error}");
                        assert_eq!(written.seq_len(), 0);
                        thread::yield_now();
                    }
                    assert_eq!(numbers(&written.keys().unwrap()), numbers(&new(k).contiguous().unwrap()));
                }
            });
            while !writer.is_finished() {
                assert_eq!(attended(), before);
            }
        });
        assert_eq!(counts(cache.blocks_in_use()), blocks);
    }
}
