//! Growing, copying, going back, forking and swapping happen in all groups or in none.

use std::ops::Range;

use block_table::{BlockId, BlockTable, PoolGroup, ReserveError, Snapshot};

use crate::common::Slots;
use crate::support::{
    Recorded, check, chunked, compute, found, full, larger, pool_of, sinking, tokens, visit, windowed,
};

/// Everything that a failed call must leave as it was.
#[derive(Debug, PartialEq)]
struct State {
    blocks: Vec<Vec<BlockId>>,
    freed: Vec<Range<usize>>,
    len: usize,
    capacity: usize,
    pool: Snapshot,
    available: usize,
}

fn state(table: &BlockTable) -> State {
    let (pool, groups) = (table.pool(), 0..table.pool().groups().len());
    State {
        blocks: groups.clone().map(|group| table.blocks_of_group(group).to_vec()).collect(),
        freed: groups.map(|group| table.freed_blocks_of_group(group)).collect(),
        len: table.len(),
        capacity: table.capacity(),
        pool: pool.snapshot(),
        available: pool.available(),
    }
}

#[test]
fn a_reserve_that_fails_for_one_group_changes_none() {
    // A block of the second group takes what three of the first do. Whichever comes first, the first group would fit.
    for groups in [[full(), larger(3, windowed(8))], [larger(3, windowed(8)), full()]] {
        let pool = pool_of(20, 2, &groups);
        drop(visit(&pool, &tokens(9, 4), 4));
        let mut table = BlockTable::new(&pool);
        compute(&mut table, &tokens(1, 5), 5);
        assert_eq!((pool.available(), pool.evictable()), (20 - 3 * 4, 2 * 4));
        let before = state(&table);
        // Three more blocks in each group: three units are there for the first, but not nine.
        match table.reserve(7) {
            Err(ReserveError::OutOfBlocks(full)) => assert_eq!((full.requested, full.available), (3 * 4, 8)),
            other => panic!("{other:?}"),
        }
        assert_eq!(state(&table), before);
        assert_eq!(found(&pool, &tokens(9, 4)), 4, "nothing was evicted");
        assert!(table.reserve(usize::MAX).is_err());
        assert_eq!(state(&table), before);
        table.reserve(5).unwrap();
        assert_eq!((pool.available(), pool.stats().evictions), (0, 4));
        check(&pool, [&table]);
    }
}

#[test]
fn the_last_block_is_copied_in_all_groups_at_once_before_it_is_written() {
    let groups = [full(), windowed(6), larger(2, chunked(8)), sinking(4, 3)];
    let recorded = Recorded::new(200, 4, &groups);
    let pool = &recorded.pool;
    let prompt = tokens(1, 10);
    let mut table = recorded.computed(&prompt, 4);
    let mut fork = table.fork();
    let (available, need) = (pool.available(), fork.lookup_prefix(&[&prompt[..], &[1]].concat()).blocks);
    fork.reserve(1).unwrap();
    assert_eq!((available - pool.available(), need), (5, 5));
    assert_eq!(pool.stats().copies, 4, "one in each group");
    for group in 0..4 {
        let (a, b) = (table.blocks_of_group(group), fork.blocks_of_group(group));
        assert_eq!(a.len(), b.len());
        let (last, others) = (a.len() - 1, ..a.len() - 1);
        assert_eq!(a[others], b[others], "group {group}: the others are shared");
        assert_ne!(a[last], b[last], "group {group}");
    }
    let (ours, theirs) = ([&prompt[..], &[1, 2, 3]].concat(), [&prompt[..], &[4, 5, 6, 7]].concat());
    recorded.write(&mut fork, &[&prompt[..], &[4]].concat());
    recorded.compute(&mut fork, &theirs, 3);
    recorded.compute(&mut table, &ours, 3);
    assert_eq!(pool.stats().copies, 4, "the table is the only one that uses its own");
    recorded.assert_holds(&table, &ours);
    recorded.assert_holds(&fork, &theirs);
    check(pool, [&table, &fork]);
}

#[test]
fn without_room_for_copies_the_last_block_is_uncached_and_written_in_place_in_all_groups() {
    let recorded = Recorded::new(8, 4, &[full(), larger(3, windowed(9))]);
    let pool = &recorded.pool;
    let prompt = tokens(1, 8);
    let mut table = recorded.computed(&prompt, 8);
    assert_eq!(pool.available(), 0);
    table.truncate(6).unwrap();
    let ids = [0, 1].map(|group| table.blocks_of_group(group).to_vec());
    recorded.compute(&mut table, &[&prompt[..6], &[7]].concat(), 1);
    assert_eq!([0, 1].map(|group| table.blocks_of_group(group).to_vec()), ids);
    assert_eq!((pool.stats().copies, found(pool, &prompt)), (0, 4));
    recorded.assert_holds(&table, &[&prompt[..6], &[7]].concat());
    check(pool, [&table]);
}

#[test]
fn a_copy_that_fails_in_one_group_leaves_all_groups_as_they_were() {
    let groups = [full(), windowed(6), larger(2, full())];
    for failing in 0..groups.len() {
        let recorded = Recorded::new(80, 4, &groups);
        let pool = &recorded.pool;
        let prompt = tokens(1, 10);
        let table = recorded.computed(&prompt, 4);
        let mut fork = table.fork();
        let before = state(&fork);
        recorded.slots[failing].fail(true);
        // With growth, and without.
        for n in [1, 9] {
            assert!(matches!(fork.reserve(n), Err(ReserveError::Storage(_))), "group {failing}");
            assert_eq!(state(&fork), before, "group {failing}");
            recorded.assert_holds(&fork, &prompt);
            recorded.assert_holds(&table, &prompt);
            check(pool, [&table, &fork]);
        }
        recorded.slots[failing].fail(false);
        recorded.compute(&mut fork, &tokens(1, 19), 9);
        recorded.assert_holds(&fork, &tokens(1, 19));
        recorded.assert_holds(&table, &prompt);
        check(pool, [&table, &fork]);
    }
}

#[test]
fn a_table_goes_back_only_if_all_groups_can() {
    // After 40 tokens the windows begin at 31 and 19, the chunk at 36: blocks are freed before 28, 16 and 36.
    let recorded = Recorded::new(300, 4, &[full(), windowed(10), windowed(22), chunked(12)]);
    let pool = &recorded.pool;
    let prompt = tokens(1, 40);
    let mut table = recorded.computed(&prompt, 4);
    let freed: Vec<usize> = (0..4).map(|group| table.freed_blocks_of_group(group).len() * 4).collect();
    assert_eq!(freed, [0, 28, 16, 36]);
    let before = state(&table);
    for len in (1..36).rev() {
        // From 32 on, the chunks of 12 are all that does not fit; further back the windows do not fit either.
        let error = table.truncate(len).unwrap_err();
        assert_eq!(error.len, len);
        assert!(freed.contains(&error.kept) && error.needed < error.kept, "{error:?}");
        assert!(table.fork_at(len).is_err());
        assert_eq!(state(&table), before, "after a truncation to {len}");
    }
    for len in (37..40).rev() {
        let fork = table.fork_at(len).unwrap();
        recorded.assert_holds(&fork, &prompt[..len]);
        check(pool, [&table, &fork]);
        drop(fork);
        table.truncate(len).unwrap();
        recorded.assert_holds(&table, &prompt[..len]);
        check(pool, [&table]);
    }
    let other = [&prompt[..37], &[1, 2, 3, 4, 5]].concat();
    recorded.compute(&mut table, &other, 2);
    recorded.assert_holds(&table, &other);
    check(pool, [&table]);
}

#[test]
fn each_group_alone_can_refuse_to_go_back() {
    // Only the group in this place has passed anything.
    for place in 0..3 {
        let mut groups = [full(), windowed(100), chunked(100)];
        groups[place] = windowed(6);
        let recorded = Recorded::new(100, 4, &groups);
        let prompt = tokens(1, 20);
        let mut table = recorded.computed(&prompt, 4);
        let before = state(&table);
        let error = table.truncate(16).unwrap_err();
        assert_eq!((error.len, error.needed, error.kept), (16, 11, 12), "group {place}");
        assert_eq!(state(&table), before);
        table.truncate(17).unwrap();
        recorded.assert_holds(&table, &prompt[..17]);
        check(&recorded.pool, [&table]);
    }
}

#[test]
fn behind_sink_tokens_a_table_goes_back_to_them_in_all_groups() {
    let recorded = Recorded::new(100, 4, &[full(), sinking(6, 7), sinking(8, 3)]);
    let prompt = tokens(1, 40);
    let mut table = recorded.computed(&prompt, 4);
    // The second group has 8 tokens of sinks, the third only 4: its fifth token would be missing.
    for len in [5, 8] {
        let before = state(&table);
        assert!(table.truncate(len).is_err());
        assert_eq!(state(&table), before);
    }
    table.truncate(4).unwrap();
    recorded.assert_holds(&table, &prompt[..4]);
    let other = [&prompt[..4], &tokens(2, 30)[..]].concat();
    recorded.compute(&mut table, &other, 3);
    recorded.assert_holds(&table, &other);
    check(&recorded.pool, [&table]);
}

const MIXES: [&[PoolGroup]; 4] = [
    &[PoolGroup::new(1), PoolGroup::new(3)],
    &[PoolGroup::new(2), PoolGroup::new(1), PoolGroup::new(1)],
    &[PoolGroup::new(1), PoolGroup::new(2), PoolGroup::new(1), PoolGroup::new(3)],
    &[PoolGroup::new(1), PoolGroup::new(1)],
];

/// Groups of different spans and block sizes.
fn mixes() -> Vec<Vec<PoolGroup>> {
    let spans: [&[PoolGroup]; 4] = [
        &[full(), windowed(6)],
        &[sinking(5, 6), full(), chunked(8)],
        &[windowed(7), full(), sinking(9, 1), windowed(3)],
        &[windowed(5), chunked(12)],
    ];
    let mix = |(spans, sizes): (&[PoolGroup], &[PoolGroup])| {
        spans.iter().zip(sizes).map(|(span, size)| larger(size.units, *span)).collect()
    };
    spans.into_iter().zip(MIXES).map(mix).collect()
}

#[test]
fn forks_hold_the_same_in_all_groups_and_go_their_own_way() {
    for groups in mixes() {
        for len in [1, 4, 7, 16, 22, 23, 24, 25] {
            let recorded = Recorded::new(300, 4, &groups);
            let prompt = tokens(1, len);
            let table = recorded.computed(&prompt, 3);
            let mut tables = vec![(table.fork(), prompt.clone())];
            tables.extend((0..len).filter_map(|n| Some((table.fork_at(n).ok()?, prompt[..n].to_vec()))));
            for (name, (fork, known)) in tables.iter_mut().enumerate() {
                recorded.assert_holds(fork, known);
                known.extend(tokens(2 + name as u32, 9));
                recorded.compute(fork, known, 2);
            }
            recorded.assert_holds(&table, &prompt);
            tables.iter().for_each(|(fork, known)| recorded.assert_holds(fork, known));
            check(&recorded.pool, tables.iter().map(|(fork, _)| fork).chain([&table]));
            drop((table, tables));
            assert_eq!(recorded.pool.in_use(), 0);
            check(&recorded.pool, []);
        }
    }
}

#[test]
fn a_swapped_sequence_comes_back_byte_for_byte_in_all_groups() {
    for groups in mixes() {
        for len in [1, 4, 7, 16, 23, 40] {
            let recorded = Recorded::new(300, 4, &groups);
            let pool = &recorded.pool;
            let prompt = tokens(1, len);
            let mut table = recorded.computed(&prompt, 5);
            let units = pool.in_use();
            let held: usize = (0..groups.len()).map(|group| table.blocks_of_group(group).len()).sum();

            // Memory that cannot be read, of any group that has blocks, leaves the table as it is.
            let has_blocks =
                |(group, slots): (usize, &Slots)| (!table.blocks_of_group(group).is_empty()).then(|| slots.clone());
            let used: Vec<Slots> = recorded.slots.iter().enumerate().filter_map(has_blocks).collect();
            for slots in &used {
                let before = state(&table);
                slots.fail(true);
                assert!(table.swap_out().is_err());
                slots.fail(false);
                assert_eq!(state(&table), before);
                recorded.assert_holds(&table, &prompt);
            }
            let swapped = table.swap_out().unwrap();
            assert_eq!((swapped.blocks(), swapped.bytes(), swapped.len()), (units, held * 4 * 8, len));
            assert_eq!((pool.in_use(), table.len()), (0, 0));
            drop(pool.allocate(300 / groups.iter().map(|group| group.units).sum::<usize>()).unwrap());

            // Memory that cannot be written leaves no block allocated.
            for slots in &used {
                slots.fail(true);
                assert!(matches!(swapped.swap_in(), Err(ReserveError::Storage(_))));
                slots.fail(false);
                assert_eq!(pool.in_use(), 0);
                check(pool, []);
            }
            let mut back = swapped.swap_in().unwrap();
            assert_eq!(pool.in_use(), units);
            recorded.assert_holds(&back, &prompt);
            let longer = [&prompt[..], &tokens(2, 11)].concat();
            recorded.compute(&mut back, &longer, 2);
            recorded.assert_holds(&back, &longer);
            check(pool, [&back, &table]);
            // Twice is allowed.
            let again = swapped.swap_in().unwrap();
            recorded.assert_holds(&again, &prompt);
            check(pool, [&back, &again]);
        }
    }
}

#[test]
fn a_swapped_sequence_is_cached_again_and_takes_no_more_than_it_says() {
    let recorded = Recorded::new(40, 4, &[sinking(8, 3), larger(2, full())]);
    let pool = &recorded.pool;
    let prompt = tokens(1, 24);
    let mut table = recorded.computed(&prompt, 4);
    let swapped = table.swap_out().unwrap();
    // The first group knows the tokens of its sink block, the second one all of them.
    assert_eq!(swapped.blocks(), 1 + 2 + 2 * 6);
    drop(pool.allocate(13).unwrap());
    drop(pool.allocate(13).unwrap());
    assert_eq!(found(pool, &prompt), 0, "all of it was evicted");
    // 30 of 40 units are taken: too few are left.
    let hoard = [pool.allocate(9).unwrap(), pool.allocate(1).unwrap()];
    match swapped.swap_in() {
        Err(ReserveError::OutOfBlocks(full)) => assert_eq!((full.requested, full.available), (15, 10)),
        other => panic!("{other:?}"),
    }
    assert_eq!((pool.available(), pool.in_use()), (10, 30));
    drop(hoard);
    drop(swapped.swap_in().unwrap());
    assert_eq!(found(pool, &prompt), 24);
    check(pool, []);
}
