//! A caller that could do the work alone does not wait for threads that do something else. A test binary of its own: it
//! keeps the threads of the global rayon pool.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use candle_core::DType;
use common::{Random, tensor};
use paged_attention::{Attention, KvCache, KvShape};

const SHAPE: KvShape = KvShape { layers: 1, kv_heads: 4, head_dim: 64 };
const THREADS: usize = 4;
const TOKENS: usize = 400;

/// A prefill and a decode step, each of them work for several threads; returns all that was attended to.
fn attend() -> Vec<f32> {
    let cache = KvCache::builder(SHAPE).blocks(64).build().unwrap();
    let mut table = cache.table();
    let mut random = Random::new(3);
    let mut out = vec![];
    for tokens in [TOKENS, 1] {
        let mut step = cache.step();
        step.push(&mut table, &vec![1; tokens]).unwrap();
        let x = tensor(&random.numbers(tokens * SHAPE.kv_heads * SHAPE.head_dim), 4, SHAPE.head_dim, DType::F32);
        let attended = step.attend(0, &x, &x, &x, &Attention::scaled_by(SHAPE.head_dim)).unwrap();
        out.extend(attended.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        step.commit().unwrap();
    }
    out
}

/// Calls `attend` on a thread of its own, which is left behind if it does not end.
fn watched(call: impl FnOnce() -> Vec<f32> + Send + 'static) -> Result<Vec<f32>, mpsc::RecvTimeoutError> {
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || done.send(call()));
    is_done.recv_timeout(Duration::from_secs(60))
}

#[test]
fn attention_does_not_wait_for_busy_threads() {
    rayon::ThreadPoolBuilder::new().num_threads(THREADS).build_global().unwrap();
    let free = watched(attend).expect("attention ends when all threads are free");
    let local = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(THREADS).build().unwrap());

    // From now on every thread of the global pool is busy, and all of the other pool's but one.
    let (busy, is_busy) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let released = Arc::new(Mutex::new(released));
    let block = move || {
        busy.send(()).unwrap();
        // Ends when the sender is gone.
        let _ = released.lock().unwrap().recv();
    };
    (0..THREADS).for_each(|_| rayon::spawn(block.clone()));
    (0..THREADS - 1).for_each(|_| local.spawn(block.clone()));
    (0..2 * THREADS - 1).for_each(|_| is_busy.recv_timeout(Duration::from_secs(60)).unwrap());

    let from_outside = watched(attend);
    let again = watched(|| (0..300).map(|_| attend()).next_back().unwrap());
    let from_inside = watched({
        let local = local.clone();
        move || local.install(attend)
    });
    // Not before: whoever waited for the busy threads is seen by now.
    drop(release);
    let waited = "attention waits for threads that have something else to do";
    assert_eq!(from_outside.expect(waited), free);
    assert_eq!(again.expect(waited), free);
    assert_eq!(from_inside.expect(waited), free);
    // And with the threads free again, as many as there are.
    assert_eq!(watched(attend).unwrap(), free);
    assert_eq!(watched(move || local.install(attend)).unwrap(), free);
}
