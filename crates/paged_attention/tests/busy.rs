//! Attention does not wait for threads that are busy with other work, because the caller can do all of the work itself.
//! This is a test binary of its own, because it blocks the threads of the global rayon pool.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use candle_core::DType;
use common::{Random, tensor};
use paged_attention::{Attention, KvCache, KvShape};

const SHAPE: KvShape = KvShape::new(1, 4, 64);
const THREADS: usize = 4;
const TOKENS: usize = 400;

/// Runs a prefill and a decode step, each large enough for several threads. Returns the results of both.
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

/// Runs `call` on a thread of its own. If it does not end within 60 seconds, returns an error and leaves the thread
/// running.
fn with_timeout(call: impl FnOnce() -> Vec<f32> + Send + 'static) -> Result<Vec<f32>, mpsc::RecvTimeoutError> {
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || done.send(call()));
    is_done.recv_timeout(Duration::from_secs(60))
}

#[test]
fn attention_does_not_wait_for_busy_threads() {
    rayon::ThreadPoolBuilder::new().num_threads(THREADS).build_global().unwrap();
    let expected = with_timeout(attend).expect("attention does not end although all threads are idle");
    let local = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(THREADS).build().unwrap());

    // From now on all threads of the global pool are busy, and all but one of the local pool.
    let (busy, is_busy) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let released = Arc::new(Mutex::new(released));
    let block = move || {
        busy.send(()).unwrap();
        // Returns when the sender is dropped.
        let _ = released.lock().unwrap().recv();
    };
    (0..THREADS).for_each(|_| rayon::spawn(block.clone()));
    (0..THREADS - 1).for_each(|_| local.spawn(block.clone()));
    (0..2 * THREADS - 1).for_each(|_| is_busy.recv_timeout(Duration::from_secs(60)).unwrap());

    let from_outside = with_timeout(attend);
    let again = with_timeout(|| (0..300).map(|_| attend()).next_back().unwrap());
    let from_inside = with_timeout({
        let local = local.clone();
        move || local.install(attend)
    });
    // The busy threads are released only now, after all calls have ended or timed out.
    drop(release);
    let waited = "attention waits for busy threads";
    assert_eq!(from_outside.expect(waited), expected);
    assert_eq!(again.expect(waited), expected);
    assert_eq!(from_inside.expect(waited), expected);
    // The results are the same when all threads are idle again.
    assert_eq!(with_timeout(attend).unwrap(), expected);
    assert_eq!(with_timeout(move || local.install(attend)).unwrap(), expected);
}
