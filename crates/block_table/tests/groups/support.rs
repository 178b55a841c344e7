//! What the scenarios share: pools, sequences, what is cached, and evicting on purpose.

use std::collections::{HashMap, HashSet};

use block_pool::Blocks;
use block_table::{BlockId, BlockPool, BlockTable, GroupBlock, KvEvent, KvEvents, PoolGroup, PrefixKey, Span, Window};

use crate::common::{Slots, content};

pub(crate) fn full() -> PoolGroup {
    PoolGroup::new(1)
}

pub(crate) fn windowed(tokens: usize) -> PoolGroup {
    full().span(Window::new(tokens))
}

pub(crate) fn sinking(tokens: usize, sink_tokens: usize) -> PoolGroup {
    full().span(Window::new(tokens).with_sink_tokens(sink_tokens))
}

pub(crate) fn chunked(tokens: usize) -> PoolGroup {
    full().span(Span::chunks(tokens))
}

/// The same layers with larger blocks.
pub(crate) fn larger(units: usize, group: PoolGroup) -> PoolGroup {
    PoolGroup::new(units).span(group.span)
}

pub(crate) fn pool_of(units: usize, block_size: usize, groups: &[PoolGroup]) -> BlockPool {
    BlockPool::of_groups(units, block_size, groups).unwrap()
}

/// `n` tokens that no other `name` has.
pub(crate) fn tokens(name: u32, n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| name * 100_000 + i).collect()
}

/// These tokens and one more: the last of a prompt is never matched.
pub(crate) fn asked(tokens: &[u32]) -> Vec<u32> {
    [tokens, &[u32::MAX]].concat()
}

/// How many of these tokens a prompt that continues them would find. This does not count as use of the blocks.
pub(crate) fn found(pool: &BlockPool, tokens: &[u32]) -> usize {
    pool.lookup_prefix(&PrefixKey::new(), &asked(tokens)).tokens
}

/// Computes the rest of `tokens`, which the table has the first of, `piece` by `piece`.
pub(crate) fn compute(table: &mut BlockTable, tokens: &[u32], piece: usize) {
    for piece in tokens[table.len()..].chunks(piece) {
        table.reserve(piece.len()).unwrap();
        table.commit_tokens(piece).unwrap();
    }
}

/// A sequence that has used what it found of these tokens and computed the rest.
pub(crate) fn visit(pool: &BlockPool, tokens: &[u32], piece: usize) -> BlockTable {
    let mut table = BlockTable::new(pool);
    table.match_prefix(tokens);
    compute(&mut table, tokens, piece);
    table
}

/// Checks the pool, and that these tables use its blocks and nothing else does.
pub(crate) fn check<'t>(pool: &BlockPool, tables: impl IntoIterator<Item = &'t BlockTable>) {
    let tables: Vec<&BlockTable> = tables.into_iter().collect();
    pool.check().unwrap();
    for group in 0..pool.groups().len() {
        pool.check_ref_counts_of_group(group, tables.iter().map(|table| table.blocks_of_group(group))).unwrap();
    }
    assert!(pool.resident() <= pool.units(), "{} units have memory", pool.resident());
}

/// The numbers of the blocks that a table has in a group.
pub(crate) fn numbers(table: &BlockTable, group: usize) -> Vec<usize> {
    let block_size = table.pool().block_size();
    (0..table.capacity() / block_size).filter(|n| table.slot_of_group(group, n * block_size).is_some()).collect()
}

/// What is cached according to the pool's events: the group and the tokens from the first of the sequence to the last of
/// the block.
pub(crate) struct Cached {
    events: KvEvents,
    blocks: HashMap<(usize, BlockId), Vec<u32>>,
}

impl Cached {
    pub(crate) fn of(pool: &BlockPool) -> Self {
        let mut cached = Self { events: pool.subscribe(), blocks: HashMap::new() };
        cached.update();
        cached
    }

    /// Applies the events since the last call, and returns the group and the tokens of the blocks that were removed.
    pub(crate) fn update(&mut self) -> Vec<(usize, Vec<u32>)> {
        let Self { events, blocks } = self;
        let mut all_removed = Vec::new();
        for event in events.try_iter() {
            match event {
                KvEvent::BlockStored { group, block, parent, tokens, .. } => {
                    let before = parent.map(|GroupBlock { group, block }| blocks[&(group, block)].clone());
                    let known = blocks.insert((group, block), [before.unwrap_or_default(), tokens].concat());
                    assert_eq!(known, None, "block {block:?} of group {group} was stored twice");
                }
                KvEvent::BlockRemoved { group, block } => {
                    all_removed.push((group, blocks.remove(&(group, block)).unwrap()));
                }
                KvEvent::AllBlocksCleared => blocks.clear(),
                other => panic!("{other:?}"),
            }
        }
        all_removed
    }

    pub(crate) fn set(&self) -> HashSet<(usize, Vec<u32>)> {
        self.blocks.iter().map(|((group, _), tokens)| (*group, tokens.clone())).collect()
    }

    pub(crate) fn blocks(&self) -> &HashMap<(usize, BlockId), Vec<u32>> {
        &self.blocks
    }
}

/// Evicts exactly this many units, those that the pool evicts next. All evictable blocks must take one unit, and there
/// must be free memory for one block of each group.
pub(crate) fn evict(pool: &BlockPool, units: usize) {
    let of_all_groups: usize = pool.groups().iter().map(|group| group.units).sum();
    let after = pool.evictable() - units;
    let to_take = || pool.available() - pool.evictable() + units;
    let mut hoard = Vec::new();
    // Lists get a block in each group. One that keeps only the first makes the rest divisible.
    while !to_take().is_multiple_of(of_all_groups) {
        hoard.push(first_group_only(pool.allocate(1).unwrap()));
    }
    hoard.push(pool.allocate(to_take() / of_all_groups).unwrap());
    assert_eq!(pool.evictable(), after);
}

/// Frees the blocks of all groups with a window but no sink tokens, and keeps those of groups without.
fn first_group_only(blocks: Blocks) -> Blocks {
    let len = blocks.end() * blocks.pool().block_size();
    let mut kept = blocks.with_window(Some(Window::new(1).with_sink_tokens(usize::MAX)));
    kept.free_invisible(len);
    kept
}

/// Caches the blocks of `prompt` in all groups, and evicts some: of the first group all but the `first` ones, of the
/// others all but the `others`. The returned lists keep the pool from evicting more.
///
/// If there are other groups, the first one sees all tokens.
pub(crate) fn keep(pool: &BlockPool, prompt: &[u32], first: &[bool], others: &[bool]) -> Vec<Blocks> {
    let block_size = pool.block_size();
    let mut all = pool.allocate(first.len()).unwrap();
    all.cache(&PrefixKey::new(), 0, &[], prompt).unwrap();
    let mut kept = Vec::new();
    let mut only_others = 0;
    for (number, (&first, &others)) in first.iter().zip(others).enumerate() {
        if first {
            // A window of its own makes a list pass all blocks but this one.
            let mut own = all.fork(number + 1).with_window(Some(Window::new(1)));
            own.free_invisible(number * block_size);
            kept.push(if others { own } else { first_group_only(own) });
        }
        if others && !first {
            only_others += 1;
        } else {
            all.copy_on_write(number, 0).unwrap();
        }
    }
    evict(pool, pool.evictable());
    // Lists free the blocks of groups with windows last. So those of the first group are evicted.
    drop(all);
    evict(pool, only_others);
    let cached = Cached::of(pool).set();
    for group in 0..pool.groups().len() {
        for (number, keeps) in if group == 0 { first } else { others }.iter().enumerate() {
            let block = (group, prompt[..(number + 1) * block_size].to_vec());
            assert_eq!(cached.contains(&block), *keeps, "block {number} of group {group}");
        }
    }
    pool.check().unwrap();
    kept
}

/// A pool whose groups record what is written to each slot, and overwrite what is freed.
pub(crate) struct Recorded {
    pub(crate) pool: BlockPool,
    pub(crate) slots: Vec<Slots>,
}

impl Recorded {
    pub(crate) fn new(units: usize, block_size: usize, groups: &[PoolGroup]) -> Self {
        let (pool, slots) = Slots::pool_of_groups(units, block_size, groups);
        Self { pool, slots }
    }

    /// What the layers of a group write for the last of these tokens.
    fn content(group: usize, tokens: &[u32]) -> u64 {
        content(tokens) ^ (group as u64 + 1)
    }

    /// Writes what the model writes for the positions that are reserved for the rest of `tokens`, and commits them.
    pub(crate) fn write(&self, table: &mut BlockTable, tokens: &[u32]) {
        let new = table.len()..tokens.len();
        for position in new.clone() {
            for (group, slots) in self.slots.iter().enumerate() {
                let slot = table.slot_of_group(group, position).unwrap();
                slots.write(slot, Self::content(group, &tokens[..=position]));
            }
        }
        table.commit_tokens(&tokens[new]).unwrap();
    }

    /// Computes the rest of `tokens`, `piece` by `piece`.
    pub(crate) fn compute(&self, table: &mut BlockTable, tokens: &[u32], piece: usize) {
        while table.len() < tokens.len() {
            let end = tokens.len().min(table.len() + piece);
            table.reserve(end - table.len()).unwrap();
            self.write(table, &tokens[..end]);
        }
    }

    pub(crate) fn computed(&self, tokens: &[u32], piece: usize) -> BlockTable {
        let mut table = BlockTable::new(&self.pool);
        self.compute(&mut table, tokens, piece);
        table
    }

    /// Everything that the next token sees in each group is there, and has the content that belongs to these tokens.
    pub(crate) fn assert_holds(&self, table: &BlockTable, tokens: &[u32]) {
        assert_eq!(table.len(), tokens.len());
        for (group, slots) in self.slots.iter().enumerate() {
            let span = table.span_of_group(group);
            for position in 0..tokens.len() {
                let seen = position < span.sink_tokens() || position >= span.start(tokens.len());
                let Some(slot) = table.slot_of_group(group, position) else {
                    assert!(!seen, "group {group} does not have position {position} of {}", tokens.len());
                    continue;
                };
                let expected = Self::content(group, &tokens[..=position]);
                assert_eq!(slots.get(slot), expected, "group {group}, position {position} of {}", tokens.len());
            }
        }
    }
}

/// Random numbers that are the same each time.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}
