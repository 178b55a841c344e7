//! What stays cached under pressure: the blocks that a window has passed go first, those of idle sequences later.

use block_table::{BlockPool, BlockTable, PoolGroup};

use crate::support::{
    Cached, Recorded, asked, check, chunked, compute, evict, found, full, pool_of, tokens, visit, windowed,
};

const BLOCK: usize = 4;

/// Users come back in turn, each with all of its history and `turn` new tokens, `piece` at a time. The pool has room for
/// all their full blocks, and in each group with a window for the blocks of each one's window and two more.
fn users_take_turns(groups: &[PoolGroup], window_blocks: usize, turn: usize, piece: usize) {
    const USERS: usize = 8;
    const ROUNDS: usize = 12;
    let last = (turn * ROUNDS).div_ceil(BLOCK);
    let of_user = |group: &PoolGroup| if group.span.is_all() { last } else { window_blocks + 2 };
    let pool = pool_of(USERS * groups.iter().map(of_user).sum::<usize>(), BLOCK, groups);
    for round in 1..=ROUNDS {
        for user in 0..USERS {
            let history = tokens(user as u32, turn * round);
            let mut table = BlockTable::new(&pool);
            let computed = turn * (round - 1) / BLOCK * BLOCK;
            assert_eq!(
                table.match_prefix(&asked(&history[..turn * (round - 1)])),
                computed,
                "user {user} of round {round}, {turn} tokens a turn, {piece} at a time, {groups:?}"
            );
            compute(&mut table, &history, piece);
            check(&pool, [&table]);
        }
    }
    // There was no room to spare.
    let passed = USERS * (last - window_blocks) * groups.iter().filter(|group| !group.span.is_all()).count();
    assert!(pool.stats().evictions as usize >= passed - 2 * USERS * groups.len(), "{:?}", pool.stats());
    check(&pool, []);
}

#[test]
fn users_who_take_turns_find_all_that_was_computed_for_them() {
    // Turns that end with a full block.
    for turn in [BLOCK, 3 * BLOCK, 7 * BLOCK] {
        for piece in [BLOCK, turn] {
            for group in [windowed(12), windowed(13), chunked(12)] {
                users_take_turns(&[full(), group], 3, turn, piece);
            }
            users_take_turns(&[windowed(12), full(), windowed(5)], 3, turn, piece);
        }
    }
}

#[test]
fn users_whose_turns_end_inside_a_block_find_all_full_blocks() {
    for turn in [3, 5, 7, 10, 29] {
        for piece in [1, BLOCK, turn] {
            users_take_turns(&[full(), windowed(13)], 4, turn, piece);
        }
    }
    // The next token sees one block less than a token at the start of the last block does, and that is where a match of
    // the full blocks ends. So that block must not be evicted first.
    for turn in [5, 7, 10, 29] {
        for piece in [1, BLOCK, turn] {
            users_take_turns(&[full(), windowed(12)], 4, turn, piece);
        }
    }
}

#[test]
fn without_a_full_group_users_find_all_full_blocks_too() {
    for turn in [8, 5, 7, 11] {
        for piece in [1, BLOCK] {
            users_take_turns(&[windowed(12)], 3, turn, piece);
            users_take_turns(&[windowed(12), windowed(8)], 3, turn, piece);
        }
    }
}

#[test]
fn users_find_all_full_blocks_if_the_next_token_sees_none_of_them() {
    // A window that begins inside the last block, which is not full.
    for window in [2, 3, 4] {
        for turn in [5, 7, 10] {
            users_take_turns(&[full(), windowed(window)], 2, turn, 1);
        }
    }
}

#[test]
fn users_find_all_full_blocks_if_a_chunk_ends_inside_a_block() {
    // The last full block may belong to the chunk before: then all of that chunk is seen from the end of the match.
    for chunk in [6, 10, 11] {
        for turn in [5, 7, 10] {
            users_take_turns(&[full(), chunked(chunk)], 4, turn, 1);
        }
    }
}

#[test]
fn where_sequences_part_the_window_stays_when_the_second_has_passed_it() {
    // Blocks of a token's window where the sequences part, after 9 blocks.
    for (group, seen) in [(windowed(8), 2), (windowed(13), 3), (chunked(8), 1)] {
        let common = tokens(1, 9 * BLOCK);
        let of = |name| [&common[..], &tokens(name, 20 * BLOCK)[..]].concat();
        // The second computes the common part again, or finds it and goes on.
        for again in [true, false] {
            let pool = pool_of(200, BLOCK, &[full(), group]);
            let first = visit(&pool, &of(2), BLOCK);
            if again {
                // Everything that the first sequence's window has passed. In the middle of a chunk nothing is found.
                evict(&pool, pool.evictable());
                assert_eq!(found(&pool, &common), if group == chunked(8) { 8 * BLOCK } else { 0 });
            }
            let second = visit(&pool, &of(3), BLOCK);
            drop((first, second));
            assert_eq!(pool.usage(0).evictable, 9 + 20 + 20, "the common part is cached once");
            // As many window blocks as all three beginnings need, whose next tokens see this many.
            let at_end = group.span.start(29 * BLOCK) / BLOCK;
            evict_passed(&pool, 49, seen + 2 * (29 - at_end));
            assert_eq!(found(&pool, &of(2)), 29 * BLOCK, "{group:?}");
            assert_eq!(found(&pool, &of(3)), 29 * BLOCK, "{group:?}");
            let third = of(4);
            assert_eq!(found(&pool, &third), 9 * BLOCK, "{group:?}, computed again: {again}");
            let table = visit(&pool, &third, BLOCK);
            check(&pool, [&table]);
        }
    }
}

/// Evicts until the pool has only `full` blocks of the first group and about `windows` of the second: the two that were
/// passed last, and those of a window that begins inside a block, may stay too.
fn evict_passed(pool: &BlockPool, full: usize, windows: usize) {
    evict(pool, pool.evictable() - full - windows - 4);
    assert_eq!(pool.usage(0).evictable, full, "full blocks are not evicted before those that were passed");
}

#[test]
fn an_idle_sequence_loses_passed_blocks_then_its_tail_then_its_last_window() {
    let (pool, prompt) = (pool_of(60, BLOCK, &[full(), windowed(8)]), tokens(1, 10 * BLOCK));
    drop(visit(&pool, &prompt, BLOCK));
    let mut cached = Cached::of(&pool);
    // The block that was passed last stays longer: a shorter match may need it.
    let passed = (0..7).map(|n| (1, n));
    let tail = (0..10).rev().map(|n| (0, n));
    let window = [(1, 7), (1, 9), (1, 8)];
    for (i, expected) in passed.chain(tail).chain(window).enumerate() {
        // All of it is found until the first full block goes, then one block less. Then nothing is: the windows before
        // were passed.
        let blocks = [10, 9, 0][i.saturating_sub(7).min(2)];
        assert_eq!(found(&pool, &prompt), blocks * BLOCK, "after {i} evictions");
        evict(&pool, 1);
        let removed: Vec<_> = cached.update().iter().map(|(group, of)| (*group, of.len() / BLOCK - 1)).collect();
        assert_eq!(removed, [expected], "eviction {i}");
        check(&pool, []);
    }
    assert_eq!(pool.evictable(), 0);
}

#[test]
fn the_branch_used_last_is_found_whole_until_the_other_is_gone() {
    let pool = pool_of(100, BLOCK, &[full(), windowed(8)]);
    let common = tokens(1, 5 * BLOCK);
    let of = |name| [&common[..], &tokens(name, 5 * BLOCK)[..]].concat();
    drop(visit(&pool, &of(2), BLOCK));
    drop(visit(&pool, &of(3), BLOCK));
    let all = pool.evictable();
    assert_eq!(all, 15 + 15);
    let whole = |name| found(&pool, &of(name)) == 10 * BLOCK;
    // Of the window blocks, eleven were passed. Two of them are seen where the branches part, two were passed last.
    let passed = 11 - 2 - 2;
    // Then the first branch goes: its five full blocks, its last window; then the window where they part.
    let (first, parting) = (5 + 3, 2);
    for evicted in 0..all {
        assert_eq!(whole(2), evicted <= passed, "after {evicted} evictions");
        assert_eq!(found(&pool, &of(4)) == 5 * BLOCK, evicted <= passed + first, "after {evicted} evictions");
        assert_eq!(whole(3), evicted <= passed + first + parting, "after {evicted} evictions");
        evict(&pool, 1);
        check(&pool, []);
    }
}

#[test]
fn a_look_up_does_not_count_as_use_and_a_match_counts_in_all_groups() {
    let pool = pool_of(48, BLOCK, &[full(), windowed(8)]);
    let (old, new) = (tokens(1, 5 * BLOCK), tokens(2, 5 * BLOCK));
    drop(visit(&pool, &old, 5 * BLOCK));
    drop(visit(&pool, &new, 5 * BLOCK));
    assert_eq!(found(&pool, &old), 5 * BLOCK);
    let mut table = BlockTable::new(&pool);
    assert_eq!(table.match_prefix(&asked(&old)), 5 * BLOCK);
    drop(table);
    // 2 + 2 passed blocks and all that the other has.
    evict(&pool, 2 + 2 + 5 + 3);
    assert_eq!((found(&pool, &old), found(&pool, &new)), (5 * BLOCK, 0));
    check(&pool, []);
}

#[test]
fn after_a_reset_nothing_of_any_group_is_found_and_running_sequences_go_on() {
    let recorded = Recorded::new(90, BLOCK, &[full(), windowed(8), chunked(8)]);
    let pool = &recorded.pool;
    let idle = tokens(1, 7 * BLOCK);
    drop(recorded.computed(&idle, BLOCK));
    let mut running = recorded.computed(&tokens(2, 25), BLOCK);
    pool.reset_prefix_cache();
    assert_eq!((pool.evictable(), found(pool, &idle), found(pool, &tokens(2, 24))), (0, 0, 0));
    recorded.compute(&mut running, &tokens(2, 50), 3);
    recorded.assert_holds(&running, &tokens(2, 50));
    check(pool, [&running]);
    drop(running);
    // What it began before the reset is not cached after it.
    assert_eq!((pool.evictable(), pool.in_use(), found(pool, &tokens(2, 48))), (0, 0, 0));
    drop(recorded.computed(&idle, BLOCK));
    assert_eq!(found(pool, &idle), 7 * BLOCK);
    check(pool, []);
}
