//! The throughput of several threads together.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Calls between two readings of the clock.
const BATCH: usize = 64;
/// Calls of each thread before the measurement begins, because a new thread's allocator starts empty.
const WARM_UP: usize = 16 * BATCH;

/// Calls of `operation` per second of all `threads` together, measured for `window`.
///
/// The measurement ends after a time and not after a number of calls: otherwise the slower thread would make its last
/// calls alone.
pub(crate) fn throughput(threads: usize, window: Duration, operation: impl Fn() + Sync) -> f64 {
    let ready = AtomicUsize::new(0);
    let work = || {
        for _ in 0..WARM_UP {
            operation();
        }
        ready.fetch_add(1, Ordering::AcqRel);
        while ready.load(Ordering::Acquire) < threads {
            spin_loop();
        }
        let started = Instant::now();
        let mut calls = 0;
        loop {
            for _ in 0..BATCH {
                operation();
            }
            calls += BATCH;
            let elapsed = started.elapsed();
            if elapsed >= window {
                return calls as f64 / elapsed.as_secs_f64();
            }
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("the operation does not panic")).sum()
    })
}
