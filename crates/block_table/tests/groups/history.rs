//! Random histories: what is found is what a naive search among the blocks that the events report finds.

use std::collections::HashSet;

use block_table::{BlockTable, PoolGroup};

use crate::support::{
    Cached, Random, Recorded, asked, check, chunked, found, full, larger, numbers, sinking, tokens, windowed,
};

const BLOCK: usize = 2;

type CachedBlocks = HashSet<(usize, Vec<u32>)>;

/// Whether the blocks are cached that a token after `len` of these tokens sees, in a group, as far as they are full.
fn has_what_is_seen(cached: &CachedBlocks, group: (usize, &PoolGroup), tokens: &[u32], len: usize) -> bool {
    let (index, PoolGroup { span, .. }) = group;
    let is_seen = |position: &usize| *position < span.sink_tokens() || *position >= span.start(len);
    (0..len / BLOCK * BLOCK).filter(is_seen).all(|position| {
        let end = (position / BLOCK + 1) * BLOCK;
        cached.contains(&(index, tokens[..end].to_vec()))
    })
}

/// The longest match in whole blocks, and the longest that may end inside a block.
fn longest(cached: &CachedBlocks, groups: &[PoolGroup], tokens: &[u32]) -> [usize; 2] {
    let matches = |len: &usize| {
        let seen = groups.iter().enumerate().all(|group| has_what_is_seen(cached, group, tokens, *len));
        let (whole, rest) = tokens[..*len].split_at(len / BLOCK * BLOCK);
        // All groups have a block of one continuation of the whole blocks that begins with the rest.
        let continues = |of: &&(usize, Vec<u32>)| {
            let is_next =
                of.1.len() == whole.len() + BLOCK && of.1.starts_with(whole) && of.1[whole.len()..].starts_with(rest);
            is_next && (0..groups.len()).all(|group| cached.contains(&(group, of.1.clone())))
        };
        seen && (rest.is_empty() || cached.iter().any(|of| continues(&of)))
    };
    let longest = |all: &mut dyn Iterator<Item = usize>| all.filter(matches).max().unwrap();
    [longest(&mut (0..=tokens.len()).step_by(BLOCK)), longest(&mut (0..=tokens.len()))]
}

/// Tokens that share beginnings of different lengths.
fn prompt(random: &mut Random) -> Vec<u32> {
    let mut prompt = tokens(1, random.below(14));
    for _ in 0..random.below(3) {
        prompt.extend(tokens(2 + random.below(2) as u32, random.below(9)));
    }
    prompt.push(7);
    prompt
}

fn random_history(groups: &[PoolGroup], seed: u64) -> [usize; 2] {
    let of_all: usize = groups.iter().map(|group| group.units).sum();
    let recorded = Recorded::new(of_all * 24, BLOCK, groups);
    let pool = &recorded.pool;
    let mut random = Random::new(seed);
    let mut cached = Cached::of(pool);
    let mut tables: Vec<(BlockTable, Vec<u32>)> = Vec::new();
    let (mut hits, mut gaps) = (0, 0);
    for _ in 0..150 {
        let at = random.below(tables.len().max(1));
        match random.below(9) {
            0..=2 if tables.len() < 5 => {
                let prompt = prompt(&mut random);
                let mut table = BlockTable::new(pool);
                let (need, available) = (table.lookup_prefix(&prompt), pool.available());
                assert_eq!(table.match_prefix(&prompt), need.tokens);
                hits += usize::from(need.tokens > 0);
                recorded.assert_holds(&table, &prompt[..need.tokens]);
                let reserved = table.reserve(prompt.len() - table.len());
                assert_eq!(reserved.is_ok(), need.blocks <= available, "seed {seed}, {need:?}, {available}");
                if reserved.is_ok() {
                    assert_eq!(available - pool.available(), need.blocks, "seed {seed}, {need:?}");
                    recorded.write(&mut table, &prompt);
                    tables.push((table, prompt));
                }
            }
            3 | 4 if !tables.is_empty() => {
                let (table, known) = &mut tables[at];
                let longer = [&known[..], &tokens(2 + random.below(3) as u32, 1 + random.below(6))].concat();
                if table.reserve(longer.len() - known.len()).is_ok() {
                    recorded.write(table, &longer);
                    *known = longer;
                }
            }
            5 if !tables.is_empty() => {
                let (table, known) = &mut tables[at];
                let len = random.below(known.len() + 1);
                if table.truncate(len).is_ok() {
                    known.truncate(len);
                }
            }
            6 if !tables.is_empty() && tables.len() < 5 => {
                let len = random.below(tables[at].1.len() + 1);
                if let Ok(fork) = tables[at].0.fork_at(len) {
                    let known = tables[at].1[..len].to_vec();
                    tables.push((fork, known));
                }
            }
            7 if !tables.is_empty() => drop(tables.swap_remove(at)),
            8 if !tables.is_empty() && random.below(3) == 0 => {
                // Copies in the middle: the originals are idle while blocks that follow them are in use.
                let (table, known) = &mut tables[at];
                let start = random.below(known.len() + 1);
                let _ = table.make_writable(start..(start + 1).min(known.len()));
            }
            _ => {
                // As many as a sequence of some length would take.
                let all = pool.available() / of_all;
                drop(pool.allocate(random.below(all + 1)).unwrap());
            }
        }
        cached.update();
        let set = cached.set();
        for (table, known) in &tables {
            recorded.assert_holds(table, known);
        }
        for _ in 0..4 {
            let prompt = prompt(&mut random);
            let n = found(pool, &prompt);
            let [whole, part] = longest(&set, groups, &prompt);
            assert!((whole..=part).contains(&n), "seed {seed}, {groups:?}: {n} of {prompt:?}, not {whole} to {part}");
            let first_block = |group: usize| set.contains(&(group, prompt[..BLOCK.min(prompt.len())].to_vec()));
            gaps += usize::from(n > 0 && (0..groups.len()).any(|group| !first_block(group)));
        }
        check(pool, tables.iter().map(|(table, _)| table));
        assert_eq!(Cached::of(pool).blocks(), cached.blocks());
    }
    for (table, _) in &tables {
        assert!((0..groups.len()).all(|group| numbers(table, group).len() == table.blocks_of_group(group).len()));
    }
    drop(tables);
    assert_eq!((pool.in_use(), pool.available()), (0, pool.units()));
    check(pool, []);
    assert_eq!(found(pool, &asked(&[])), 0);
    [hits, gaps]
}

#[test]
fn a_match_is_what_a_naive_search_finds() {
    let mixes: [&[PoolGroup]; 9] = [
        &[full(), windowed(4)],
        &[windowed(3), windowed(7)],
        &[full(), chunked(6)],
        &[larger(3, full()), sinking(4, 3)],
        &[full(), windowed(2), larger(2, windowed(6))],
        &[larger(2, chunked(4)), full(), windowed(5)],
        &[windowed(4), full(), sinking(3, 2), larger(2, full())],
        &[sinking(4, 3), windowed(3)],
        &[full(), full()],
    ];
    for groups in mixes {
        let mut sums = [0, 0];
        for seed in 1..=25 {
            let of_one = random_history(groups, seed);
            sums = [sums[0] + of_one[0], sums[1] + of_one[1]];
        }
        // The histories are worth something: sequences hit, and over blocks that a window group has lost.
        let has_window = groups.iter().any(|group| !group.span.is_all());
        assert!(sums[0] > 300 && (sums[1] > 100 || !has_window), "{sums:?}, {groups:?}");
    }
}
