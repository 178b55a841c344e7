//! Which blocks a span frees as a sequence grows, and how many new ones the sequence needs.

use std::ops::Range;

use block_table::{BlockTable, PoolGroup};

use crate::support::{Cached, check, chunked, evict, full, numbers, pool_of, sinking, tokens, visit, windowed};

/// Grows a sequence to 22 tokens, whose slots are reserved at once, in a pool with a full group and this one, and checks
/// which blocks are freed: `invisible(len)` are the numbers of the blocks that no token after `len` tokens sees.
fn frees_what_is_invisible(group: PoolGroup, invisible: impl Fn(usize) -> Range<usize>) {
    for step in 1..=22 {
        let pool = pool_of(22, 2, &[full(), group]);
        let mut table = BlockTable::new(&pool);
        table.reserve(22).unwrap();
        let ids = table.blocks_of_group(1).to_vec();
        for piece in tokens(1, 22).chunks(step) {
            table.commit_tokens(piece).unwrap();
            let (len, kept) = (table.len(), numbers(&table, 1));
            assert!(
                kept.iter().all(|&n| table.slot_of_group(1, 2 * n) == Some(ids[n].index() * 2)),
                "blocks do not move"
            );
            let freed: Vec<usize> = (0..11).filter(|n| !kept.contains(n)).collect();
            assert_eq!(freed, invisible(len).collect::<Vec<usize>>(), "{group:?} after {len} tokens, {step} a step");
            assert_eq!(table.freed_blocks_of_group(1).len(), freed.len());
            assert!(freed.is_empty() || table.freed_blocks_of_group(1) == (freed[0]..freed[freed.len() - 1] + 1));
            // The full group keeps all of its own. What is freed can be used at once.
            assert_eq!((numbers(&table, 0).len(), pool.available()), (11, freed.len()));
            check(&pool, [&table]);
        }
    }
}

#[test]
fn a_window_frees_a_block_when_no_later_token_sees_it() {
    // With a window of four: the first block after five tokens, not after four, when its second token is still seen.
    let cases = [(0, 0), (4, 0), (5, 1), (6, 1), (7, 2), (11, 4)];
    assert!(cases.iter().all(|&(len, n)| (0..11).filter(|block| 2 * block + 1 + 4 <= len).count() == n));
    for window in 1..=9 {
        frees_what_is_invisible(windowed(window), |len| 0..(0..11).filter(|n| 2 * n + 1 + window <= len).count());
    }
}

#[test]
fn the_blocks_of_sink_tokens_stay() {
    for (window, sink_tokens, sinks) in [(4, 1, 1), (3, 4, 2), (1, 5, 3)] {
        frees_what_is_invisible(sinking(window, sink_tokens), |len| {
            sinks..sinks.max((0..11).filter(|n| 2 * n + 1 + window <= len).count())
        });
    }
}

#[test]
fn chunks_free_their_blocks_when_they_end() {
    frees_what_is_invisible(chunked(4), |len| 0..len / 4 * 2);
    // The middle block of two chunks has tokens of both.
    frees_what_is_invisible(chunked(3), |len| 0..len / 3 * 3 / 2);
}

#[test]
fn of_the_blocks_that_a_window_has_passed_the_oldest_are_evicted_first_and_of_one_step_the_last() {
    let (pool, prompt) = (pool_of(40, 2, &[full(), windowed(4)]), tokens(1, 11));
    let mut table = BlockTable::new(&pool);
    table.reserve(12).unwrap();
    for len in [5, 7, 11] {
        let new = &prompt[table.len()..len];
        table.commit_tokens(new).unwrap();
    }
    let mut cached = Cached::of(&pool);
    evict(&pool, 4);
    let removed: Vec<_> = cached.update().into_iter().map(|(group, tokens)| (group, tokens.len() / 2 - 1)).collect();
    assert_eq!(removed, [(1, 0), (1, 1), (1, 3), (1, 2)]);
    check(&pool, [&table]);
}

#[test]
fn a_look_up_counts_idle_blocks_and_new_ones_in_each_group() {
    // What a token after ten blocks sees: all ten, the last five, the last four.
    let cases = [(full(), 10), (windowed(10), 5), (chunked(12), 4)];
    for (group, seen) in cases {
        let pool = pool_of(100, 2, &[full(), group]);
        let prompt = tokens(1, 40);
        let first = visit(&pool, &prompt[..20], 20);
        let new = BlockTable::new(&pool);
        let in_use = new.lookup_prefix(&prompt);
        assert_eq!((in_use.tokens, in_use.in_use, in_use.evictable, in_use.blocks), (20, 10 + seen, 0, 20));
        drop(first);
        // Idle blocks cannot be evicted any more when they are in use: they count as if they were allocated.
        let idle = new.lookup_prefix(&prompt);
        assert_eq!((idle.tokens, idle.in_use, idle.evictable), (20, 0, 10 + seen));
        assert_eq!(idle.blocks, (10 + 10) + (seen + 10));
        let before = pool.available();
        let mut table = BlockTable::new(&pool);
        table.match_prefix(&prompt);
        assert_eq!(before - pool.available(), 10 + seen, "a matched block is not allocated twice");
        table.reserve(20).unwrap();
        assert_eq!(before - pool.available(), idle.blocks);
        check(&pool, [&table]);
    }
}

#[test]
fn each_step_takes_as_many_blocks_as_the_look_up_before_it_said() {
    for group in [windowed(8), windowed(3), chunked(8), sinking(4, 3)] {
        for step in [1, 3, 4, 9] {
            let (pool, prompt) = (pool_of(100, 2, &[full(), group]), tokens(1, 60));
            let mut table = BlockTable::new(&pool);
            for end in (step..60).step_by(step) {
                let before = pool.available();
                let need = table.lookup_prefix(&prompt[..end]).blocks;
                table.reserve(end - table.len()).unwrap();
                assert_eq!(before - pool.available(), need, "{group:?}, {step} tokens up to {end}");
                let new = &prompt[table.len()..end];
                table.commit_tokens(new).unwrap();
            }
            check(&pool, [&table]);
        }
    }
}
