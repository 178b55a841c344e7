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

#[test]
fn threads_end_with_the_publisher_and_with_the_pool() {
    let pool = BlockPool::new(4, 2).unwrap();
    let start = || Publisher::builder("tcp://127.0.0.1:0").replay_endpoint("tcp://127.0.0.1:0").start(&pool).unwrap();
    let publisher = start();
    let endpoint = publisher.endpoint().to_owned();
    assert_eq!(publishing_threads(), 2);
    assert!(Publisher::builder(&endpoint).start(&pool).is_err());
    drop(publisher);
    let begin = Instant::now();
    while publishing_threads() > 0 {
        assert!(begin.elapsed() < Duration::from_secs(10), "threads go on");
        std::thread::yield_now();
    }
    // The endpoint is free again.
    drop(Publisher::builder(&endpoint).start(&pool).unwrap());

    let publisher = start();
    drop(pool);
    while publishing_threads() > 0 {
        assert!(begin.elapsed() < Duration::from_secs(10), "threads go on");
        std::thread::yield_now();
    }
    drop(publisher);
}
