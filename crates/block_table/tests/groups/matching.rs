//! Which prefix is found when only some blocks of each group are cached.

use block_table::{BlockId, BlockTable, PoolGroup};

use crate::support::{
    Recorded, asked, check, chunked, evict, found, full, keep, larger, numbers, pool_of, sinking, tokens, visit,
    windowed,
};

#[test]
fn a_prompt_is_found_again_whatever_the_groups_are() {
    const BLOCK: usize = 16;
    let (small, large) = (windowed(2 * BLOCK), windowed(4 * BLOCK));
    let mixes: &[&[PoolGroup]] = &[
        &[full(), small],
        &[small, large],
        &[full(), full()],
        &[full(), chunked(2 * BLOCK)],
        &[full(), small, small],
        &[full(), small, large],
        &[full(), full(), small],
        &[full(), small, full(), large],
        &[full(), chunked(3 * BLOCK), small],
        &[small, chunked(2 * BLOCK), large, sinking(BLOCK, 1)],
        &[larger(3, full()), small],
        &[full(), larger(5, small), larger(2, large)],
    ];
    let common = tokens(1, 3 * BLOCK);
    for groups in mixes {
        let units: usize = groups.iter().map(|group| group.units).sum();
        let pool = pool_of(10 * units, BLOCK, groups);
        assert_eq!(found(&pool, &common), 0);
        let first = visit(&pool, &[&common[..], &[3; 7]].concat(), 55);
        let seen: Vec<Vec<BlockId>> = (0..groups.len()).map(|group| first.blocks_of_group(group).to_vec()).collect();

        let prompt = [&common[..], &[4; 5]].concat();
        let mut second = BlockTable::new(&pool);
        assert_eq!(second.match_prefix(&prompt), 3 * BLOCK, "{groups:?}");
        for (group, of) in groups.iter().enumerate() {
            let span = of.span;
            let expected: Vec<usize> =
                (0..3).filter(|n| n * BLOCK < span.sink_tokens() || (n + 1) * BLOCK > span.start(3 * BLOCK)).collect();
            assert_eq!(numbers(&second, group), expected, "{groups:?}, group {group}");
            // The first sequence has passed the same blocks or fewer: it is longer by less than a block.
            let shared = second.blocks_of_group(group).iter().filter(|id| seen[group].contains(id)).count();
            assert!(shared + 1 >= expected.len() && shared >= expected.len().min(1), "{groups:?}, group {group}");
        }
        let before = pool.available();
        second.reserve(5).unwrap();
        assert_eq!(before - pool.available(), units, "one new block in each group");
        second.commit_tokens(&prompt[3 * BLOCK..]).unwrap();
        check(&pool, [&first, &second]);
        drop((first, second));
        assert_eq!(found(&pool, &common), 3 * BLOCK, "{groups:?}");
        check(&pool, []);
    }
}

/// Whether each block is cached: `x` is, `-` is not.
fn pattern(text: &str) -> Vec<bool> {
    text.chars().map(|c| c == 'x').collect()
}

/// How many blocks are found if of the first group and of the others only these are cached.
fn found_of(groups: &[PoolGroup], first: &[bool], others: &[bool]) -> usize {
    const BLOCK: usize = 2;
    let pool = pool_of(8 * (first.len() + 1) * groups.len(), BLOCK, groups);
    let prompt = tokens(1, first.len() * BLOCK);
    let kept = keep(&pool, &prompt, first, others);
    let matched = found(&pool, &prompt);
    let mut table = BlockTable::new(&pool);
    assert_eq!(table.match_prefix(&asked(&prompt)), matched, "a look-up says what a match finds");
    for group in 0..groups.len() {
        let lists = kept.iter().map(|blocks| blocks.group(group)).chain([table.blocks_of_group(group)]);
        pool.check_ref_counts_of_group(group, lists).unwrap();
    }
    assert!(matched.is_multiple_of(BLOCK));
    matched / BLOCK
}

#[test]
fn each_group_needs_its_own_blocks() {
    // A window of two blocks: of those before it, a token sees the last two.
    let cases = [
        ("xxx", "xxx", 3),
        // A window block that the next token does not see is not needed.
        ("xxx", "-xx", 3),
        ("xxxxxx", "----xx", 6),
        // Without the first block of the full group nothing is found.
        ("-xx", "xxx", 0),
        // The last block is missing: of all groups, of the full one, of those with windows.
        ("xx-", "xx-", 2),
        ("xx-", "xxx", 2),
        ("xxx", "xx-", 2),
        // The full group could match one block or two, the window three: but none of these is good for both.
        ("xx-", "-xx", 0),
        ("x--", "-xx", 0),
        ("xxxx-", "---xx", 0),
        // A block missing in the middle of the full group cuts the match, if the windows at the cut are there.
        ("xxx-xx", "xxxxxx", 3),
        ("xxx-xx", "-xxxxx", 3),
        ("xxx-xx", "x-xxxx", 1),
        ("xxx-xx", "--xxxx", 0),
        // Outside the last window they are not needed, in it they are.
        ("xxxxxx", "x--xxx", 6),
        ("xxxxxx", "xxxx-x", 4),
        ("xxxxxx", "xxx-x-", 3),
        ("xxxxxx", "x-x-x-", 1),
        ("xxxxxx", "-x-x-x", 0),
        ("xxxxx-", "xxx-xx", 3),
        ("------", "xxxxxx", 0),
        ("xxxxxx", "------", 0),
    ];
    for (first, others, blocks) in cases {
        let (of_first, of_others) = (pattern(first), pattern(others));
        // The same with two groups with windows.
        for groups in [&[full(), windowed(4)][..], &[full(), windowed(4), windowed(4)]] {
            assert_eq!(found_of(groups, &of_first, &of_others), blocks, "{first} and {others}, {groups:?}");
        }
    }
}

/// All patterns of `n` blocks.
fn patterns(n: usize) -> impl Iterator<Item = Vec<bool>> {
    (0..1 << n).map(move |bits: usize| (0..n).map(|i| bits >> i & 1 == 1).collect())
}

/// The longest match in whole blocks of two tokens if the token after `len` tokens sees those from `start(len)` on.
fn longest(kept: &[bool], start: impl Fn(usize) -> usize) -> usize {
    let is_seen = |len: usize, block: usize| 2 * block + 1 >= start(len);
    (0..=kept.len()).rev().find(|&n| (0..n).all(|block| kept[block] || !is_seen(2 * n, block))).unwrap()
}

#[test]
fn the_longest_match_behind_a_window_ends_where_all_that_the_next_token_sees_is_cached() {
    for window in 1..=6 {
        let start = |len: usize| (len + 1).saturating_sub(window);
        for kept in patterns(7) {
            let n = found_of(&[full(), windowed(window)], &[true; 7], &kept);
            assert_eq!(n, longest(&kept, start), "a window of {window}, {kept:?}");
        }
    }
    let cases = [
        ("----------", 0),
        ("x", 1),
        ("x-", 1),
        ("xx", 2),
        ("xx-", 2),
        ("xxx-", 3),
        ("xx-x--xx-xxx", 12),
        ("xx-x--xx---", 8),
        ("xx-x--xx---x", 8),
    ];
    for (kept, blocks) in cases {
        let kept = pattern(kept);
        assert_eq!(found_of(&[full(), windowed(4)], &vec![true; kept.len()], &kept), blocks);
        // A window group that is alone in its pool finds the same.
        assert_eq!(found_of(&[windowed(4)], &kept, &kept), blocks);
    }
}

#[test]
fn the_longest_match_in_a_chunk_needs_the_blocks_of_the_chunk_only() {
    for chunk in [2, 3, 4, 5, 6] {
        for kept in patterns(7) {
            let n = found_of(&[full(), chunked(chunk)], &[true; 7], &kept);
            assert_eq!(n, longest(&kept, |len| len / chunk * chunk), "chunks of {chunk}, {kept:?}");
        }
    }
    let cases = [
        // Where a chunk ends, the next token sees nothing of it.
        ("x-", 2),
        ("--", 2),
        ("xx-", 2),
        ("xxx", 3),
        ("xxx-", 4),
        ("-x-x--xxx", 9),
        ("-x-x--xx-", 8),
        ("x-x-xx--xx", 10),
        ("x-x-xx--x-", 10),
        ("x-x-xx---x", 10),
        ("----------", 10),
    ];
    for (kept, blocks) in cases {
        let kept = pattern(kept);
        assert_eq!(found_of(&[full(), chunked(4)], &vec![true; kept.len()], &kept), blocks);
    }
}

#[test]
fn without_the_blocks_of_sink_tokens_nothing_is_found() {
    let groups = [sinking(4, 3), windowed(6)];
    let (pool, prompt) = (pool_of(60, 2, &groups), tokens(1, 20));
    let mut table = visit(&pool, &prompt, 2);
    evict(&pool, pool.evictable());
    assert_eq!(found(&pool, &prompt), 20);
    // The table gets a copy of its second block, which has the last of the sink tokens; the original is evicted.
    table.make_writable(2..3).unwrap();
    evict(&pool, pool.evictable());
    assert_eq!(found(&pool, &prompt), 0);
    check(&pool, [&table]);
}

#[test]
fn a_match_may_end_inside_a_block_and_continues_in_a_copy_in_all_groups() {
    let recorded = Recorded::new(90, 4, &[full(), windowed(8), chunked(12)]);
    let pool = &recorded.pool;
    let first = recorded.computed(&tokens(1, 23), 4);
    for n in 1..20 {
        // The last block that is cached ends at 20.
        let prompt = [&tokens(1, n)[..], &[7, 8, 9]].concat();
        let mut table = BlockTable::new(pool);
        let (available, copies) = (pool.available(), pool.stats().copies);
        let need = table.lookup_prefix(&prompt).blocks;
        assert_eq!(table.match_prefix(&prompt), n, "the first {n} tokens are the same");
        recorded.assert_holds(&table, &prompt[..n]);
        table.reserve(3).unwrap();
        assert_eq!(available - pool.available(), need, "with {n} tokens in common");
        assert_eq!(pool.stats().copies - copies, if n % 4 == 0 { 0 } else { 3 });
        recorded.write(&mut table, &prompt);
        recorded.assert_holds(&table, &prompt);
        recorded.assert_holds(&first, &tokens(1, 23));
        check(pool, [&first, &table]);
    }
}
