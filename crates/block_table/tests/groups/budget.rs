//! One budget for all groups: what a scheduler is told, what events tell, and whose memory is whose.

use std::collections::HashSet;

use block_table::{BlockPool, BlockTable, KvEvent, PoolGroup, TableOptions};

use crate::common::Slots;
use crate::support::{
    Cached, Random, Recorded, asked, check, chunked, compute, found, full, larger, pool_of, sinking, tokens, visit,
    windowed,
};

#[test]
fn events_name_the_group_and_a_late_subscriber_is_told_the_same() {
    let pool = pool_of(60, 2, &[full(), windowed(4), chunked(6)]);
    let mut early = Cached::of(&pool);
    let common = tokens(1, 8);
    let mut random = Random::new(7);
    for name in 0..60 {
        let prompt = [&common[..random.below(9)], &tokens(2 + name % 5, random.below(16))].concat();
        let table = visit(&pool, &prompt, 1 + random.below(5));
        early.update();
        for group in 0..3 {
            // Each full block that the table has was stored, for its group and under its tokens.
            for (n, chunk) in prompt.chunks_exact(2).enumerate() {
                let Some(slot) = table.slot_of_group(group, 2 * n) else { continue };
                let id = table.blocks_of_group(group).iter().find(|id| id.index() == slot / 2).unwrap();
                let known = &early.blocks()[&(group, *id)];
                assert_eq!((&known[..], &known[2 * n..]), (&prompt[..2 * n + 2], chunk));
            }
        }
        drop(table);
        let late = Cached::of(&pool);
        assert_eq!(late.blocks(), early.blocks());
        let cached: usize = (0..3).map(|group| pool.usage(group).evictable).sum();
        assert_eq!(late.blocks().len(), cached);
    }
    assert!(pool.stats().evictions > 100, "{:?}", pool.stats());
    pool.reset_prefix_cache();
    early.update();
    assert!(early.blocks().is_empty() && Cached::of(&pool).blocks().is_empty());
    check(&pool, []);
}

#[test]
fn an_evicted_block_is_reported_for_the_group_that_lost_it() {
    let pool = pool_of(12, 2, &[full(), windowed(4)]);
    let mut table = BlockTable::new(&pool);
    compute(&mut table, &tokens(1, 12), 2);
    let mut events = pool.subscribe();
    events.try_iter().for_each(drop);
    // Six full blocks and two of the window are in use; the four that it passed are evicted.
    drop(pool.allocate(2).unwrap());
    let removed: Vec<usize> = events
        .try_iter()
        .map(|event| match event {
            KvEvent::BlockRemoved { group, .. } => group,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(removed, [1; 4]);
    check(&pool, [&table]);
}

/// The most units in use while a sequence computes `prompt`, in pieces of the lengths that `next` gives.
fn peak(pool: &BlockPool, table: &mut BlockTable, prompt: &[u32], mut next: impl FnMut() -> usize) -> usize {
    let mut most = 0;
    while table.len() < prompt.len() {
        let piece = &prompt[table.len()..(table.len() + next()).min(prompt.len())];
        table.reserve(piece.len()).unwrap();
        most = most.max(pool.in_use());
        table.commit_tokens(piece).unwrap();
    }
    most
}

/// Lengths up to `longest`.
fn uneven(longest: usize, seed: u64) -> impl FnMut() -> usize {
    let mut random = Random::new(seed);
    move || 1 + random.below(longest)
}

#[test]
fn a_long_prompt_in_pieces_fits_where_the_look_up_says_so() {
    let mixes: [&[PoolGroup]; 5] = [
        &[windowed(16), windowed(7)],
        &[full(), windowed(9)],
        &[windowed(5), larger(3, chunked(12))],
        &[larger(2, sinking(6, 5)), chunked(7), windowed(1)],
        &[full(), larger(4, windowed(8)), larger(2, sinking(10, 9))],
    ];
    let prompt = tokens(1, 151);
    for groups in mixes {
        for block_size in [1, 3, 4] {
            for piece in [1, 2, 5, 8, 17] {
                let roomy = pool_of(5000, block_size, groups);
                let new = BlockTable::new(&roomy);
                let whole = new.lookup_prefix(&prompt).blocks;
                let need = new.lookup_prefix_in_chunks(&prompt, piece).blocks;
                let tight = pool_of(need, block_size, groups);
                let case = format!("{groups:?}, {block_size} tokens a block, {piece} at a time: {need} or {whole}");
                assert!(whole > need, "{case}");
                assert_eq!(BlockTable::new(&tight).lookup_prefix_in_chunks(&prompt, piece).blocks, need, "{case}");
                assert!(BlockTable::new(&tight).reserve(prompt.len()).is_err(), "{case}");
                for seed in 0..4 {
                    let private = TableOptions::default().private();
                    peak(&tight, &mut BlockTable::with_options(&tight, &private), &prompt, uneven(piece, seed));
                }
                let mut table = BlockTable::new(&tight);
                let most = peak(&tight, &mut table, &prompt, || piece);
                assert_eq!(table.len(), prompt.len());
                // Not much more is asked for: in each group two blocks and a piece.
                let spare = |group: &PoolGroup| group.units * (2 + piece.div_ceil(block_size));
                assert!(need <= most + groups.iter().map(spare).sum::<usize>(), "{case}, {most} were in use");
                check(&tight, [&table]);
            }
        }
    }
}

/// The same for tables that match nothing: private ones, and those that go on inside a block, alone or shared with a
/// fork.
#[test]
fn a_sequence_that_goes_on_in_pieces_fits_where_the_look_up_says_so() {
    let mixes: [&[PoolGroup]; 3] =
        [&[windowed(16)], &[full(), windowed(9)], &[larger(2, sinking(6, 5)), chunked(7), windowed(1)]];
    let prompt = tokens(1, 151);
    for groups in mixes {
        for (block_size, piece) in [(1, 3), (4, 1), (4, 5), (4, 8), (16, 10)] {
            let starts = [(0, false), (1, false), (7, true), (33, false), (33, true), (48, true)];
            for ((begun, is_forked), seed) in starts.into_iter().flat_map(|start| (0..4).map(move |seed| (start, seed)))
            {
                let case = format!("{groups:?}, blocks of {block_size}, {begun} and then {piece}, forked {is_forked}");
                let pool = pool_of(5000, block_size, groups);
                let mut table = BlockTable::with_options(&pool, &TableOptions::default().private());
                peak(&pool, &mut table, &prompt[..begun], || piece);
                let fork = is_forked.then(|| table.fork());
                let need = table.lookup_prefix_in_chunks(&prompt, piece).blocks;
                assert!(need < table.lookup_prefix(&prompt).blocks, "{case}");
                // Others leave just as much as the look-up says.
                let mut hoard = Vec::new();
                while pool.available() >= need + pool.units_per_block() {
                    hoard.push(pool.allocate((pool.available() - need) / pool.units_per_block()).unwrap());
                }
                let before = pool.in_use();
                let most = match seed {
                    0 => peak(&pool, &mut table, &prompt, || piece),
                    seed => peak(&pool, &mut table, &prompt, uneven(piece, seed)),
                };
                assert_eq!(table.len(), prompt.len(), "{case}");
                // Not much more is asked for: in each group two blocks and a piece, and what a fork keeps.
                let spare = |group: &PoolGroup| group.units * (2 + piece.div_ceil(block_size));
                let kept = if is_forked { begun.div_ceil(block_size) * pool.units_per_block() } else { 0 };
                let spare = groups.iter().map(spare).sum::<usize>() + kept;
                assert!(need <= most - before + spare, "{case}: {need} for {}", most - before);
                drop((hoard, fork));
                check(&pool, [&table]);
            }
        }
    }
}

#[test]
fn a_prompt_that_is_half_cached_fits_in_pieces_in_what_others_leave() {
    let groups = [full(), windowed(9), larger(2, sinking(6, 3))];
    let prompt = tokens(1, 120);
    for cached in [0, 3, 40, 57, 80] {
        for piece in [1, 6, 16] {
            let pool = pool_of(300, 4, &groups);
            let other = visit(&pool, &[&prompt[..cached], &tokens(2, 5)].concat(), 4);
            let mut table = BlockTable::new(&pool);
            let need = table.lookup_prefix_in_chunks(&prompt, piece);
            assert!(need.blocks < table.lookup_prefix(&prompt).blocks);
            assert_eq!(need.tokens, found(&pool, &prompt));
            // The match first: the others take all but the rest of what it needs.
            let before = pool.available();
            assert_eq!(table.match_prefix(&prompt), need.tokens);
            let rest = need.blocks - (before - pool.available());
            let mut hoard = Vec::new();
            while pool.available() >= rest + 4 {
                hoard.push(pool.allocate((pool.available() - rest) / 4).unwrap());
            }
            compute(&mut table, &prompt, piece);
            assert!(pool.available() < need.blocks, "{cached} are cached, {piece} at a time");
            pool.check().unwrap();
            drop(hoard);
            check(&pool, [&table, &other]);
        }
    }
}

/// Starts sequences of `len` tokens until no more fit, and drops them. Returns how many fit.
fn fill(recorded: &Recorded, name: &mut u32, len: usize) -> usize {
    let pool = &recorded.pool;
    let mut tables = Vec::new();
    loop {
        *name += 1;
        let (mut table, prompt) = (BlockTable::new(pool), tokens(*name, len));
        while table.len() < len && table.reserve(8.min(len - table.len())).is_ok() {
            let end = len.min(table.len() + 8);
            recorded.write(&mut table, &prompt[..end]);
            // What has memory, as the system counts it, and what the pool says.
            let with_memory = |(slots, group): (&Slots, &PoolGroup)| slots.with_memory() * group.units;
            let units: usize = recorded.slots.iter().zip(pool.groups()).map(with_memory).sum();
            assert!(units <= pool.resident() && pool.resident() <= pool.units(), "{units} units, {pool:?}");
        }
        let fits = table.len() == len;
        tables.push((table, prompt));
        check(pool, tables.iter().map(|(table, _)| table));
        if !fits {
            break;
        }
    }
    let fits = tables.len() - 1;
    tables[..fits].iter().for_each(|(table, prompt)| recorded.assert_holds(table, prompt));
    fits
}

#[test]
fn memory_moves_between_groups_and_never_exceeds_the_budget() {
    for groups in [vec![full(), larger(2, windowed(8))], vec![larger(3, windowed(4)), full(), larger(2, chunked(8))]] {
        let recorded = Recorded::new(120, 4, &groups);
        let (pool, mut name) = (&recorded.pool, 0);
        let full_group = groups.iter().position(|group| group.span.is_all()).unwrap();
        let mut counts = HashSet::new();
        for round in 0..4 {
            // Long sequences take mostly full blocks, short ones as many with windows.
            let long = fill(&recorded, &mut name, 300);
            let full_blocks = pool.usage(full_group).evictable;
            assert!(full_blocks * 4 >= 300 * long && long > 0, "{full_blocks} in round {round}");
            let short = fill(&recorded, &mut name, 8);
            assert!(pool.usage(full_group).evictable < full_blocks, "the memory went to the other groups");
            counts.insert((long, short));
            check(pool, []);
        }
        // As many fit each time, whatever the memory was used for before.
        let of_short = 2 * groups.iter().map(|group| group.units).sum::<usize>();
        assert_eq!(counts.len(), 1, "{counts:?}");
        assert!(counts.iter().all(|(_, short)| *short >= 120 / of_short), "{counts:?}");
        assert_eq!(pool.available(), 120);
    }
}

#[test]
fn every_unit_can_be_used_by_any_group() {
    // Three units a block in one group, one in the other.
    let pool = pool_of(31, 4, &[larger(3, full()), full()]);
    assert_eq!((pool.blocks_of_group(0), pool.blocks_of_group(1), pool.blocks_of_group(2)), (10, 31, 0));
    let mut table = BlockTable::new(&pool);
    table.reserve(7 * 4).unwrap();
    assert_eq!((pool.available(), pool.in_use()), (3, 28));
    assert!(table.reserve(8 * 4).is_err());
    assert_eq!((pool.usage(0).in_use, pool.usage(1).in_use, pool.usage(2).in_use), (7, 7, 0));
    table.commit_tokens(&tokens(1, 28)).unwrap();
    drop(table);
    assert_eq!((pool.evictable(), pool.available()), (28, 31));
    // Idle blocks of both groups make room for as many as there can be.
    let mut other = BlockTable::new(&pool);
    other.reserve(7 * 4).unwrap();
    assert_eq!((pool.evictable() <= 3, pool.available()), (true, 3));
    assert_eq!(other.match_prefix(&asked(&tokens(1, 28))), 0);
    check(&pool, [&other]);
}
