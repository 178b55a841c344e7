//! Runs every interleaving of two threads on one pool. Needs `RUSTFLAGS="--cfg loom"`.

#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::panic)]

use block_pool::{BlockPool, Blocks, PoolGroup, PrefixKey, Window};
use loom::thread;

/// Runs all interleavings of two threads that start from the same pool.
fn two_threads(
    blocks: usize,
    begin: impl Fn(&BlockPool) -> (Blocks, Blocks) + Send + Sync + 'static,
    one: fn(BlockPool, Blocks) -> Option<Blocks>,
    other: fn(BlockPool, Blocks) -> Option<Blocks>,
    end: fn(&BlockPool, Option<Blocks>, Option<Blocks>),
) {
    loom::model(move || {
        let pool = BlockPool::new(blocks, 1).unwrap();
        let (a, b) = begin(&pool);
        let thread = thread::spawn({
            let pool = pool.clone();
            move || one(pool, a)
        });
        let b = other(pool.clone(), b);
        let a = thread.join().unwrap();
        let lists: Vec<&[_]> = a.iter().chain(&b).map(|blocks| &**blocks).collect();
        pool.check_ref_counts(lists).unwrap();
        end(&pool, a, b);
        assert_eq!(pool.available(), pool.blocks());
        pool.check_ref_counts([]).unwrap();
    });
}

fn nothing(pool: &BlockPool) -> (Blocks, Blocks) {
    (Blocks::empty(pool), Blocks::empty(pool))
}

/// Leaves one evictable block in the pool, cached under the token 7.
fn cache_and_free(pool: &BlockPool) {
    let mut blocks = pool.allocate(1).unwrap();
    blocks.cache(&PrefixKey::new(), 0, &[], &[7]).unwrap();
}

#[test]
fn a_block_is_allocated_by_one_thread_only() {
    let allocate = |pool: BlockPool, _| pool.allocate(2).ok();
    two_threads(3, nothing, allocate, allocate, |_, a, b| {
        assert!(a.is_some() != b.is_some(), "of three blocks, two can be allocated only once");
    });
}

#[test]
fn forking_and_dropping_keep_the_ref_count_right() {
    let shared = |pool: &BlockPool| {
        let a = pool.allocate(1).unwrap();
        let b = a.fork(1);
        (a, b)
    };
    let fork_and_drop = |_, mine: Blocks| {
        let third = mine.fork(1);
        drop(mine);
        Some(third)
    };
    two_threads(2, shared, fork_and_drop, |_, mine| drop_all(mine), |pool, _, _| assert_eq!(pool.available(), 1));
}

fn drop_all(blocks: Blocks) -> Option<Blocks> {
    drop(blocks);
    None
}

#[test]
fn both_sides_of_a_fork_end_with_different_blocks() {
    let shared = |pool: &BlockPool| {
        let a = pool.allocate(1).unwrap();
        let b = a.fork(1);
        (a, b)
    };
    let write = |_, mut mine: Blocks| {
        mine.copy_on_write(0, 0).unwrap();
        Some(mine)
    };
    two_threads(3, shared, write, write, |_, a, b| assert_ne!(a.unwrap()[0], b.unwrap()[0]));
}

#[test]
fn a_cached_block_is_matched_or_evicted_never_both() {
    let begin = |pool: &BlockPool| {
        cache_and_free(pool);
        nothing(pool)
    };
    let match_prefix = |_, mut mine: Blocks| (mine.match_prefix(&PrefixKey::new(), 0, &[7]) == 1).then_some(mine);
    let evict = |pool: BlockPool, _| pool.allocate(1).ok();
    two_threads(1, begin, match_prefix, evict, |_, matched, allocated| {
        assert!(matched.is_some() != allocated.is_some())
    });
}

#[test]
fn the_same_content_is_cached_once() {
    let cache = |pool: BlockPool, _| {
        let mut mine = pool.allocate(1).unwrap();
        mine.cache(&PrefixKey::new(), 0, &[], &[7]).unwrap();
        Some(mine)
    };
    two_threads(2, nothing, cache, cache, |pool, a, b| {
        assert_eq!(a.unwrap()[0], b.unwrap()[0]);
        assert_eq!(pool.evictable(), 1);
        pool.reset_prefix_cache();
    });
}

#[test]
fn nothing_computed_before_a_reset_is_cached_after_it() {
    let begin = |pool: &BlockPool| (pool.allocate(1).unwrap(), Blocks::empty(pool));
    let cache = |_, mut mine: Blocks| {
        mine.cache(&PrefixKey::new(), 0, &[], &[7]).unwrap();
        drop_all(mine)
    };
    let reset = |pool: BlockPool, _| {
        pool.reset_prefix_cache();
        None
    };
    two_threads(1, begin, cache, reset, |pool, _, _| assert_eq!(pool.evictable(), 0));
}

/// Runs all interleavings of two threads that each allocate, over a pool of two groups that share their memory.
fn two_threads_in_groups(units: usize, work: fn(BlockPool) -> Option<Blocks>, end: fn(Option<Blocks>, Option<Blocks>)) {
    loom::model(move || {
        let groups = [PoolGroup::new(1), PoolGroup::new(2).span(Window::new(1))];
        let pool = BlockPool::of_groups(units, 1, &groups).unwrap();
        let thread = thread::spawn({
            let pool = pool.clone();
            move || work(pool)
        });
        let b = work(pool.clone());
        let a = thread.join().unwrap();
        for group in 0..2 {
            let lists = a.iter().chain(&b).map(|blocks| blocks.group(group));
            pool.check_ref_counts_of_group(group, lists).unwrap();
        }
        assert!(pool.resident() <= pool.units());
        end(a, b);
        assert_eq!(pool.available(), pool.units());
        pool.check().unwrap();
    });
}

#[test]
fn a_transaction_over_groups_is_all_or_nothing() {
    // A block of both groups takes 3 of 5 units: one thread gets them.
    let allocate = |pool: BlockPool| pool.allocate(1).ok();
    two_threads_in_groups(5, allocate, |a, b| {
        assert!(a.is_some() != b.is_some());
        let blocks = a.or(b).unwrap();
        assert_eq!((blocks.group(0).len(), blocks.group(1).len()), (1, 1));
    });
}

#[test]
fn memory_moves_between_groups_while_both_are_used() {
    // Each thread grows, frees what its window has passed, and grows again where the other's blocks have been.
    let grow = |pool: BlockPool| {
        let mut blocks = pool.allocate(1).ok()?;
        for len in 1..3 {
            blocks.free_invisible(len);
            // The other thread may have the memory, or may be giving it back at this moment.
            let _ = blocks.grow(1);
        }
        Some(blocks)
    };
    two_threads_in_groups(8, grow, |a, b| drop((a, b)));
}
