//! Sequences that store blocks in a tier and start with blocks from there: every slot has what its tokens say, also if
//! the tier fails, and whatever happens in between.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use block_table::{
    BlockPool, BlockTable, FetchLimits, Offload, OffloadOptions, PoolGroup, ReserveError, Salt, TableOptions, Window,
};
use common::Slots;
use common::memory_tier::{Memory, Place};
use common::sequence::Sequence;

fn random(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |n| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    }
}

fn history(groups: &[PoolGroup], seed: u64) -> usize {
    let mut below = random(seed);
    let (block_size, tier) = ([1, 3, 4][seed as usize % 3], Arc::new(Memory::default()));
    let mut gained = 0;
    // Each pool is another process.
    for _ in 0..4 {
        let (pool, slots) = Slots::pool_of_groups(60 * groups.len(), block_size, groups);
        let options = OffloadOptions::default().max_staged_bytes(below(20) * block_size * 8);
        let offload =
            (below(3) > 0).then(|| pool.offload_to(tier.clone(), &options.write_through(below(2) == 0)).unwrap());
        let mut running: Vec<Sequence> = Vec::new();
        for _ in 0..60 {
            {
                let mut inner = tier.0.lock().unwrap();
                inner.failing_loads = [0, 0, 0, 1, 3, 7][below(6)];
                inner.failing_stores = below(8) == 0;
                if below(4) == 0 {
                    // Blocks leave the tier.
                    let mut places: Vec<Place> = inner.blocks.keys().cloned().collect();
                    places.sort_by_cached_key(|place| format!("{place:?}"));
                    places.iter().filter(|_| below(9) == 0).for_each(|place| drop(inner.blocks.remove(place)));
                }
            }
            if below(3) > 0 || running.is_empty() {
                let mut sequence = Sequence::new(&pool, below(3) as u32);
                // One of a few texts, up to where it goes on in its own way.
                let (text, same) = (below(3) as u32 + 10, below(40));
                sequence.all.extend((0..same as u32).map(|i| text * 100 + i));
                sequence.all.extend((0..1 + below(9)).map(|_| below(4) as u32));
                sequence.table.match_prefix(&sequence.all[1..]);
                sequence.check(&slots);
                let max_bytes = [usize::MAX, block_size * 8 * below(30)][below(2)];
                let fetched =
                    sequence.table.fetch(&*tier, sequence.tokens(), &FetchLimits::default().max_bytes(max_bytes));
                assert!(fetched.bytes() <= max_bytes);
                let before = sequence.table.len();
                match below(9) {
                    0 => pool.reset_prefix_cache(),
                    1 => drop(sequence.table.truncate(below(before + 1))),
                    2 => sequence.table.salt_from(before, Salt::new(b"late")).unwrap(),
                    // Another sequence computes the same meanwhile.
                    3 => {
                        let mut other = Sequence { table: BlockTable::new(&pool), all: sequence.all.clone() };
                        if other.all[0] == 0 {
                            other.table.match_prefix(&other.all[1..]);
                            other.compute(&slots);
                            running.push(other);
                        }
                    }
                    4 => slots[below(slots.len())].fail(true),
                    _ => {}
                }
                let inserted = sequence.table.insert(&fetched);
                slots.iter().for_each(|slots| slots.fail(false));
                let has_late_salt = !sequence.table.salts().is_empty();
                match inserted {
                    Ok(tokens) => gained += tokens,
                    Err(ReserveError::OutOfBlocks(_)) => {}
                    Err(ReserveError::Storage(_)) => assert_eq!(sequence.table.len(), 0),
                }
                sequence.check(&slots);
                // What it gets under a salt from a position on is other content.
                if !has_late_salt && sequence.compute(&slots) {
                    running.push(sequence);
                }
            } else {
                let sequence = running.swap_remove(below(running.len()));
                sequence.check(&slots);
                let stored = sequence.table.store_prefix(&*tier);
                assert!(stored.is_ok() || tier.0.lock().unwrap().failing_stores);
            }
            running.truncate(5);
            // The next action finds the tier as it is in every run.
            offload.iter().for_each(Offload::flush);
            pool.check().unwrap();
        }
        running.iter().for_each(|sequence| sequence.check(&slots));
        drop(running);
        assert_eq!(pool.in_use(), 0);
    }
    // All that the tier has is what it should have.
    tier.check(block_size);
    gained
}

fn windowed(tokens: usize, sink_tokens: usize) -> PoolGroup {
    PoolGroup::new(1).span(Window::new(tokens).with_sink_tokens(sink_tokens))
}

#[test]
fn random_histories_read_what_was_written() {
    let full = PoolGroup::new(1);
    // With a window, what a sequence stores at its end is of use up to there only.
    let layouts: [(&[PoolGroup], usize); 5] = [
        (&[full], 3000),
        (&[full, windowed(7, 0)], 20),
        (&[windowed(5, 2)], 20),
        (&[windowed(6, 0), PoolGroup::new(2), windowed(11, 3)], 20),
        (&[PoolGroup::new(1).span(block_table::Span::chunks(8)), full], 20),
    ];
    for (i, (groups, least)) in layouts.into_iter().enumerate() {
        let gained: usize = (0..60).map(|seed| history(groups, seed)).sum();
        assert!(gained > least, "layout {i}: {gained} tokens");
    }
}

#[test]
fn a_prefix_is_found_in_another_pool() {
    let tier = Memory::default();
    let tokens: Vec<u32> = (0..18).collect();
    let sequence = |pool: &BlockPool| {
        let mut sequence = Sequence::new(pool, 0);
        sequence.all.extend(&tokens);
        sequence
    };
    let (pool, slots) = Slots::pool_of_groups(20, 4, &[PoolGroup::new(1)]);
    let mut first = sequence(&pool);
    first.compute(&slots);
    let stored = first.table.store_prefix(&tier).unwrap();
    assert_eq!((stored.new, stored.already), (4, 0));
    assert_eq!(first.table.store_prefix(&tier).unwrap().already, 4);

    let (pool, slots) = Slots::pool_of_groups(20, 4, &[PoolGroup::new(1)]);
    // Two tokens of the second block are in the pool.
    let mut other = Sequence::new(&pool, 0);
    other.all.extend([0, 1, 2, 3, 4, 5, 99, 99, 99]);
    assert!(other.compute(&slots));
    let mut second = sequence(&pool);
    assert_eq!(second.table.match_prefix(&tokens), 6);
    let fetched = second.table.fetch(&tier, &tokens, &FetchLimits::default());
    assert_eq!((fetched.len(), fetched.bytes()), (16, 3 * 4 * 8));
    assert_eq!(second.table.insert(&fetched).unwrap(), 10);
    second.check(&slots);
    // Another sequence finds it in the pool.
    assert_eq!(BlockTable::new(&pool).match_prefix(&tokens), 16);
    // The tier is not asked for more than it may read, nor after its time.
    let limit = |bytes| FetchLimits::default().max_bytes(bytes);
    let table = BlockTable::new(&pool);
    assert_eq!([0, 31, 32, 95, 96].map(|bytes| table.fetch(&tier, &tokens, &limit(bytes)).len()), [0, 0, 4, 8, 12]);
    assert_eq!([0, 95, 128].map(|bytes| table.fetch(&tier, &tokens, &limit(bytes)).has_more()), [true, true, false]);
    assert_eq!([17, 16, 5].map(|len| table.lookup_tier(&tier, &tokens[..len])), [16, 12, 4]);
    assert!(table.fetch(&tier, &tokens, &FetchLimits::default().max_time(Duration::ZERO)).is_empty());
    // The last token is computed.
    assert_eq!(table.fetch(&tier, &tokens[..16], &FetchLimits::default()).len(), 12);
    assert!(
        BlockTable::with_options(&pool, &TableOptions::default().private())
            .fetch(&tier, &tokens, &limit(999))
            .is_empty()
    );
}

#[test]
fn what_does_not_fit_is_computed() {
    let tier = Memory::default();
    let (pool, slots) = Slots::pool_of_groups(20, 4, &[PoolGroup::new(1)]);
    let mut first = Sequence::new(&pool, 0);
    first.all.extend(0..40);
    first.compute(&slots);
    first.table.store_prefix(&tier).unwrap();
    let (pool, _slots) = Slots::pool_of_groups(5, 4, &[PoolGroup::new(1)]);
    let mut table = BlockTable::new(&pool);
    let fetched = table.fetch(&tier, first.tokens(), &FetchLimits::default());
    assert!(matches!(table.insert(&fetched), Err(ReserveError::OutOfBlocks(_))));
    assert_eq!((table.len(), pool.in_use()), (0, 0));
    // Blocks of one pool are not put into another.
    let (other, _slots) = Slots::pool_of_groups(50, 4, &[PoolGroup::new(1)]);
    assert_eq!(BlockTable::new(&other).insert(&fetched).unwrap(), 0);
}

#[test]
fn a_windowed_prefix_is_read_in_pieces() {
    for groups in [&[windowed(25, 0)][..], &[windowed(9, 3), PoolGroup::new(1)]] {
        let tier = Arc::new(Memory::default());
        let (pool, slots) = Slots::pool_of_groups(40, 4, groups);
        let offload = pool.offload_to(tier.clone(), &OffloadOptions::default().write_through(true)).unwrap();
        let mut first = Sequence::new(&pool, 1);
        first.all.extend(0..50);
        assert!(first.compute(&slots));
        offload.flush();
        let (pool, slots) = Slots::pool_of_groups(40, 4, groups);
        let mut second = Sequence::new(&pool, 1);
        second.all.extend(0..50);
        let mut reader = second.table.prefix_reader(second.tokens());
        assert_eq!(reader.lookup(&*tier), 48);
        let mut pieces = 0;
        loop {
            let piece = reader.read(&*tier, &FetchLimits::default().max_bytes(groups.len() * 3 * 4 * 8));
            if piece.is_empty() {
                break;
            }
            assert!(second.table.insert(&piece).unwrap() > 0);
            second.check(&slots);
            pieces += 1;
        }
        assert_eq!(second.table.len(), 48);
        assert!(pieces > 1, "{pieces}");
        pool.check().unwrap();
        // Others find it in the pool.
        let mut third = Sequence::new(&pool, 1);
        third.all.extend(0..50);
        assert_eq!(third.table.match_prefix(&third.all[1..]), 48);
        third.check(&slots);
    }
}
