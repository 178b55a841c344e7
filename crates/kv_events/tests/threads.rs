//! The threads of a publisher end with it, or with its pool. Alone in a process, since it counts the process's threads.

#![cfg(all(feature = "zmq", target_os = "linux"))]
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use block_pool::BlockPool;
use kv_events::Publisher;

/// How many threads of publishers this process has.
fn publishing_threads() -> usize {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let names = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("kv-events")).count()
}

/// Waits for this number of them: a thread takes its name by itself, some time after it was started.
fn wait_for_threads(n: usize) {
    let begin = Instant::now();
    while publishing_threads() != n {
        assert!(begin.elapsed() < Duration::from_secs(10), "{} threads instead of {n}", publishing_threads());
        std::thread::yield_now();
    }
}

#[test]
fn threads_end_with_the_publisher_and_with_the_pool() {
    let pool = BlockPool::new(4, 2).unwrap();
    let start = || Publisher::builder("tcp://127.0.0.1:0").replay_endpoint("tcp://127.0.0.1:0").start(&pool).unwrap();
    let publisher = start();
    let endpoint = publisher.endpoint().to_owned();
    wait_for_threads(2);
    drop(publisher);
    wait_for_threads(0);
    // The endpoint is free again.
    drop(Publisher::builder(&endpoint).start(&pool).unwrap());
    wait_for_threads(0);

    let publisher = start();
    wait_for_threads(2);
    assert!(Publisher::builder(publisher.endpoint()).start(&pool).is_err());
    wait_for_threads(2);
    drop(pool);
    wait_for_threads(0);
    drop(publisher);
}
