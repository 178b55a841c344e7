//! Every interleaving of two threads on one pool. Runs with `RUSTFLAGS="--cfg loom"`.

#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::panic)]

use block_pool::{BlockPool, Blocks, PrefixKey};
use loom::thread;

/// Explores all interleavings of two threads that start from the same pool.
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
        pool.check_held(lists).unwrap();
        end(&pool, a, b);
        assert_eq!(pool.available(), pool.blocks());
        pool.check_held([]).unwrap();
    });
}

fn nothing(pool: &BlockPool) -> (Blocks, Blocks) {
    (Blocks::none(pool), Blocks::none(pool))
}

/// A block that only the tree knows, with the token 7.
fn remembered(pool: &BlockPool) {
    let mut blocks = pool.take(1).unwrap();
    blocks.store(&PrefixKey::new(), 0, &[], &[7]);
}

#[test]
fn a_block_is_given_to_one_thread_only() {
    let take = |pool: BlockPool, _| pool.take(2).ok();
    two_threads(3, nothing, take, take, |_, a, b| {
        assert!(a.is_some() != b.is_some(), "three blocks hold two of two only once");
    });
}

#[test]
fn sharing_and_dropping_count_right() {
    let shared = |pool: &BlockPool| {
        let a = pool.take(1).unwrap();
        let b = a.share(1);
        (a, b)
    };
    let share_and_drop = |_, mine: Blocks| {
        let third = mine.share(1);
        drop(mine);
        Some(third)
    };
    two_threads(2, shared, share_and_drop, |_, mine| drop_all(mine), |pool, _, _| assert_eq!(pool.available(), 1));
}

fn drop_all(blocks: Blocks) -> Option<Blocks> {
    drop(blocks);
    None
}

#[test]
fn both_sides_of_a_fork_end_with_a_block_of_their_own() {
    let shared = |pool: &BlockPool| {
        let a = pool.take(1).unwrap();
        let b = a.share(1);
        (a, b)
    };
    let write = |_, mut mine: Blocks| {
        mine.own_and_grow(0, 0).unwrap();
        Some(mine)
    };
    two_threads(3, shared, write, write, |_, a, b| assert_ne!(a.unwrap()[0], b.unwrap()[0]));
}

#[test]
fn a_remembered_block_is_found_or_evicted_never_both() {
    let begin = |pool: &BlockPool| {
        remembered(pool);
        nothing(pool)
    };
    let find = |_, mut mine: Blocks| (mine.reuse(&PrefixKey::new(), 0, &[7]) == 1).then_some(mine);
    let evict = |pool: BlockPool, _| pool.take(1).ok();
    two_threads(1, begin, find, evict, |_, found, taken| assert!(found.is_some() != taken.is_some()));
}

#[test]
fn the_same_content_is_stored_once() {
    let store = |pool: BlockPool, _| {
        let mut mine = pool.take(1).unwrap();
        mine.store(&PrefixKey::new(), 0, &[], &[7]);
        Some(mine)
    };
    two_threads(2, nothing, store, store, |pool, a, b| {
        assert_eq!(a.unwrap()[0], b.unwrap()[0]);
        assert_eq!(pool.remembered(), 1);
        pool.reset();
    });
}

#[test]
fn nothing_computed_before_a_reset_is_stored_after_it() {
    let begin = |pool: &BlockPool| (pool.take(1).unwrap(), Blocks::none(pool));
    let store = |_, mut mine: Blocks| {
        mine.store(&PrefixKey::new(), 0, &[], &[7]);
        drop_all(mine)
    };
    let reset = |pool: BlockPool, _| {
        pool.reset();
        None
    };
    two_threads(1, begin, store, reset, |pool, _, _| assert_eq!(pool.remembered(), 0));
}
