//! Blocks that are evicted, or written through, are found in the tier; nothing that the tier does is waited for, and
//! nothing wrong is ever stored there.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use block_table::{
    BlockPool, BlockTable, FetchLimits, OffloadError, OffloadOptions, OffloadStats, PoolGroup, PrefixKey, SaltFrom,
    StorageError, TableOptions, Tier, TierCursor, Window,
};
use common::Slots;
use common::memory_tier::Memory;
use common::sequence::Sequence;

const FULL: &[PoolGroup] = &[PoolGroup::new(1)];

/// Computes a sequence of `blocks` blocks of four tokens which are those of no other `text`, and ends it.
fn run(pool: &BlockPool, slots: &[Slots], text: u32, blocks: u32) {
    let mut sequence = Sequence::new(pool, 0);
    sequence.all.extend((0..4 * blocks).map(|i| text * 1000 + i));
    sequence.table.match_prefix(&sequence.all[1..]);
    assert!(sequence.compute(slots));
}

/// How many tokens of that sequence and one more the tier has.
fn found(pool: &BlockPool, tier: &dyn Tier, text: u32, blocks: u32) -> usize {
    let tokens: Vec<u32> = (0..4 * blocks + 1).map(|i| text * 1000 + i).collect();
    BlockTable::new(pool).fetch(tier, &tokens, &FetchLimits::default()).len()
}

#[test]
fn an_evicted_block_is_in_the_tier() {
    let tier = Arc::new(Memory::default());
    let (pool, slots) = Slots::pool_of_groups(8, 4, FULL);
    let offload = pool.offload_to(tier.clone(), &OffloadOptions::default()).unwrap();
    assert!(matches!(pool.offload_to(tier.clone(), &OffloadOptions::default()), Err(OffloadError::Twice)));
    run(&pool, &slots, 1, 6);
    offload.flush();
    assert_eq!(tier.len(), 0);
    // This evicts the last four blocks of the first sequence.
    run(&pool, &slots, 2, 6);
    offload.flush();
    assert_eq!((tier.len(), offload.stats().stored), (4, 4));
    run(&pool, &slots, 3, 6);
    offload.flush();
    assert_eq!(found(&pool, &*tier, 1, 6), 24);
    tier.check(4);
    // What the tier has is not stored again when it is evicted once more.
    run(&pool, &slots, 1, 6);
    run(&pool, &slots, 4, 8);
    offload.flush();
    assert_eq!(found(&pool, &*tier, 3, 6), 24);
    assert_eq!(offload.stats().already, 6);
    drop(offload);
    // Now another tier can have them.
    pool.offload_to(tier, &OffloadOptions::default()).unwrap();
}

#[test]
fn a_block_that_is_written_in_place_was_cached_before() {
    let tier = Arc::new(Memory::default());
    let (pool, slots) = Slots::pool_of_groups(1, 4, FULL);
    let offload = pool.offload_to(tier.clone(), &OffloadOptions::default()).unwrap();
    let mut sequence = Sequence::new(&pool, 0);
    sequence.all.extend([5, 6, 7, 8]);
    assert!(sequence.compute(&slots));
    sequence.table.truncate(3).unwrap();
    // There is no room for a copy, so the block is uncached.
    sequence.table.reserve(1).unwrap();
    slots[0].write(sequence.table.slot(3).unwrap(), 99);
    offload.flush();
    assert_eq!((tier.len(), offload.stats().stored), (1, 1));
    tier.check(4);
}

#[test]
fn what_is_cached_is_written_through() {
    for groups in [FULL, &[PoolGroup::new(1), PoolGroup::new(2).span(Window::new(6))]] {
        let tier = Arc::new(Memory::default());
        let (pool, slots) = Slots::pool_of_groups(40, 4, groups);
        let options = OffloadOptions::default().write_through(true).max_staged_bytes(0);
        let offload = pool.offload_to(tier.clone(), &options).unwrap();
        run(&pool, &slots, 1, 6);
        drop(offload);
        assert_eq!(found(&pool, &*tier, 1, 6), 24);
        tier.check(4);
    }
}

/// The block of the window leaves first. That of the other group is stored nevertheless.
#[test]
fn a_block_is_written_through_though_that_of_another_group_has_left() {
    let tier = Arc::new(Stalled::default());
    let (pool, slots) = Slots::pool_of_groups(14, 4, &[PoolGroup::new(1), PoolGroup::new(1).span(Window::new(6))]);
    let options = OffloadOptions::default().write_through(true).max_staged_bytes(0);
    let offload = pool.offload_to(tier.clone(), &options).unwrap();
    let mut sequence = Sequence::new(&pool, 0);
    for block in 0..9 {
        sequence.all.extend((0..4).map(|at| 4 * block + at));
        assert!(sequence.compute(&slots));
    }
    assert!(pool.stats().evictions > 0 && offload.stats().stored == 0);
    tier.let_go();
    offload.flush();
    let mut cursor = tier.cursor(&PrefixKey::new());
    for (number, tokens) in sequence.tokens().chunks_exact(4).enumerate() {
        cursor.advance(tokens, &[]);
        assert!(cursor.contains(0), "block {number}");
    }
    tier.memory.check(4);
}

#[test]
fn after_a_reset_nothing_old_is_stored() {
    let tier = Arc::new(Memory::default());
    let (pool, slots) = Slots::pool_of_groups(6, 4, FULL);
    let offload = pool.offload_to(tier.clone(), &OffloadOptions::default()).unwrap();
    run(&pool, &slots, 1, 6);
    pool.reset_prefix_cache();
    run(&pool, &slots, 2, 6);
    run(&pool, &slots, 3, 3);
    offload.flush();
    assert_eq!((tier.len(), found(&pool, &*tier, 1, 6)), (3, 0));
}

#[test]
fn a_prefix_that_is_dropped_for_its_tombstones_is_in_the_tier() {
    let tier = Arc::new(Memory::default());
    let (pool, slots) = Slots::pool_of_groups(6, 4, FULL);
    let offload = pool.offload_to(tier.clone(), &OffloadOptions::default()).unwrap();
    run(&pool, &slots, 1, 1);
    // Many blocks leave its window, more than sixteen for each block of the pool.
    let options = TableOptions::default().window(Window::new(8));
    let mut long = Sequence { table: BlockTable::with_options(&pool, &options), all: vec![0] };
    for token in 0..600 {
        long.all.push(7000 + token);
        assert!(long.compute(&slots));
    }
    offload.flush();
    assert_eq!(
        (found(&pool, &*tier, 1, 1), pool.lookup_prefix(&PrefixKey::new(), &[1000, 1001, 1002, 1003, 0]).tokens),
        (4, 0)
    );
    tier.check(4);
}

/// Has the thread read a block while another sequence writes to it.
#[test]
fn a_block_that_is_evicted_while_it_is_read_is_not_stored() {
    for comes_back in [false, true] {
        let tier = Arc::new(Memory::default());
        let (pool, slots) = Slots::pool_of_groups(2, 4, FULL);
        let options = OffloadOptions::default().write_through(true).max_staged_bytes(0);
        let offload = pool.offload_to(tier.clone(), &options).unwrap();
        let read = slots[0].pause_next_read();
        // The window frees the first block, whose node stays, because the second block follows.
        let options = TableOptions::default().window(Window::new(4));
        let windowed = |tokens: std::ops::Range<u32>| {
            let mut sequence = Sequence { table: BlockTable::with_options(&pool, &options), all: vec![0] };
            sequence.all.extend(tokens);
            assert!(sequence.compute(&slots));
            sequence
        };
        let first = windowed(1..9);
        read.wait();
        let garbage = windowed(90..94);
        read.wait();
        read.wait();
        drop(garbage);
        // Now the same tokens again, in the same block of the same node.
        let again = comes_back.then(|| windowed(1..5));
        read.wait();
        offload.flush();
        tier.check(4);
        assert!(offload.stats().stored > 0);
        drop((first, again));
    }
}

/// A tier whose stores wait until they are let go.
#[derive(Debug, Default)]
struct Stalled {
    memory: Memory,
    goes: Mutex<bool>,
    changed: Condvar,
}

impl Stalled {
    fn let_go(&self) {
        *self.goes.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

struct StalledCursor<'a>(&'a Stalled, Box<dyn TierCursor + 'a>);

impl Tier for Stalled {
    fn cursor<'a>(&'a self, key: &PrefixKey) -> Box<dyn TierCursor + 'a> {
        Box::new(StalledCursor(self, self.memory.cursor(key)))
    }
}

impl TierCursor for StalledCursor<'_> {
    fn advance(&mut self, tokens: &[u32], salts: &[SaltFrom]) {
        self.1.advance(tokens, salts);
    }

    fn contains(&self, group: usize) -> bool {
        self.1.contains(group)
    }

    fn load(&mut self, group: usize) -> Option<&[u8]> {
        self.1.load(group)
    }

    fn store(&mut self, group: usize, bytes: &[u8]) -> Result<bool, StorageError> {
        drop(self.0.changed.wait_while(self.0.goes.lock().unwrap(), |goes| !*goes).unwrap());
        self.1.store(group, bytes)
    }
}

#[test]
fn nobody_waits_for_a_tier_that_stalls() {
    let tier = Arc::new(Stalled::default());
    let (pool, slots) = Slots::pool_of_groups(8, 4, FULL);
    // Room for three blocks of four slots of eight bytes.
    let offload = pool.offload_to(tier.clone(), &OffloadOptions::default().max_staged_bytes(100)).unwrap();
    for text in 0..5 {
        run(&pool, &slots, text, 8);
    }
    let OffloadStats { stored, dropped, staged_bytes, waiting, .. } = offload.stats();
    assert_eq!((stored, dropped, staged_bytes, waiting), (0, 32 - 3, 96, 3));
    tier.let_go();
    offload.flush();
    let OffloadStats { stored, staged_bytes, waiting, .. } = offload.stats();
    assert_eq!((stored, staged_bytes, waiting), (3, 0, 0));
    tier.memory.check(4);
}

/// A tier whose first store panics.
#[derive(Debug)]
struct Panics;

impl Tier for Panics {
    fn cursor<'a>(&'a self, _: &PrefixKey) -> Box<dyn TierCursor + 'a> {
        Box::new(Panics)
    }
}

impl TierCursor for Panics {
    fn advance(&mut self, _: &[u32], _: &[SaltFrom]) {}

    fn contains(&self, _: usize) -> bool {
        false
    }

    fn load(&mut self, _: usize) -> Option<&[u8]> {
        None
    }

    #[allow(clippy::panic)]
    fn store(&mut self, _: usize, _: &[u8]) -> Result<bool, StorageError> {
        panic!("on purpose")
    }
}

#[test]
fn the_pool_goes_on_after_a_tier_that_panics() {
    let (pool, slots) = Slots::pool_of_groups(8, 4, FULL);
    let offload = pool.offload_to(Arc::new(Panics), &OffloadOptions::default().write_through(true)).unwrap();
    for text in 0..5 {
        run(&pool, &slots, text, 8);
        offload.flush();
    }
    let OffloadStats { stored, staged_bytes, waiting, .. } = offload.stats();
    assert_eq!((stored, staged_bytes, waiting), (0, 0, 0));
    drop(offload);
    pool.check().unwrap();
}

#[test]
fn a_failing_storage_or_tier_loses_blocks_and_nothing_else() {
    let tier = Arc::new(Memory::default());
    let (pool, slots) = Slots::pool_of_groups(8, 4, FULL);
    let offload = pool.offload_to(tier.clone(), &OffloadOptions::default()).unwrap();
    run(&pool, &slots, 1, 8);
    slots[0].fail(true);
    run(&pool, &slots, 2, 8);
    slots[0].fail(false);
    tier.0.lock().unwrap().failing_stores = true;
    run(&pool, &slots, 3, 8);
    offload.flush();
    tier.0.lock().unwrap().failing_stores = false;
    run(&pool, &slots, 4, 8);
    offload.flush();
    let OffloadStats { stored, failed, staged_bytes, .. } = offload.stats();
    assert_eq!((stored, failed, staged_bytes), (8, 16, 0));
    assert_eq!([1, 2, 3].map(|text| found(&pool, &*tier, text, 8)), [0, 0, 32]);
    tier.check(4);
}

/// Threads compute, evict, reset and store at the same time. Whatever the tier gets is right.
#[test]
fn under_stress_nothing_wrong_is_stored() {
    for (round, groups) in [FULL, &[PoolGroup::new(1), PoolGroup::new(2).span(Window::new(9))]].into_iter().enumerate()
    {
        for write_through in [false, true] {
            let tier = Arc::new(Memory::default());
            let (pool, slots) = Slots::pool_of_groups(24 * (round + 1), 4, groups);
            let options = OffloadOptions::default().max_staged_bytes(10 * 32).write_through(write_through);
            let offload = pool.offload_to(tier.clone(), &options).unwrap();
            let ends = AtomicBool::new(false);
            thread::scope(|scope| {
                for seed in 0..3u32 {
                    let (pool, slots, ends) = (&pool, &slots, &ends);
                    scope.spawn(move || {
                        for i in 0..1500u32 {
                            let mut sequence = Sequence::new(pool, i % 2);
                            // Texts that begin alike and go on apart.
                            let (text, same) = (i.wrapping_mul(2_654_435_761 + seed) >> 27, i % 5 * 3);
                            sequence.all.extend((0..same).chain((0..i % 17).map(|at| 100 * (1 + text) + at)));
                            sequence.table.match_prefix(&sequence.all[1..]);
                            sequence.check(slots);
                            sequence.compute(slots);
                            if i % 400 == 399 {
                                pool.reset_prefix_cache();
                            }
                        }
                        ends.store(true, Ordering::Relaxed);
                    });
                }
                while !ends.load(Ordering::Relaxed) {
                    tier.check(4);
                    thread::yield_now();
                }
            });
            offload.flush();
            assert!(offload.stats().stored > 0, "{:?}", offload.stats());
            drop(offload);
            tier.check(4);
            pool.check().unwrap();
            assert_eq!(pool.in_use(), 0);
        }
    }
}
