//! Who holds what: the free blocks, the number of holders of each, and which can be found by their tokens, under one
//! lock.
//!
//! They live together so that "nobody holds it" and "it is free" are one instant: no thread ever sees a block that is
//! neither held, nor remembered, nor free.
//!
//! | | holders | cached in the tree |
//! |---|---|---|
//! | free | 0 | no |
//! | remembered | 0 | yes |
//! | held | 1 or more | maybe |
//!
//! - this file: allocating, sharing, freeing, evicting;
//! - `write`: what it takes to write to a block;
//! - `cache`: finding blocks by their tokens, and making them findable;
//! - `check`: whether all of it agrees.

mod cache;
mod check;
mod write;

use std::ops::Range;

use crate::events::Listeners;
use crate::eviction::Remembered;
use crate::free::{FreeBlocks, Pending};
use crate::prefix::PrefixTree;
use crate::{BlockId, OutOfBlocks, PoolEvent, Stats};

pub(crate) use cache::Sought;
pub(crate) use write::Owned;

#[derive(Debug)]
pub(crate) struct Ledger {
    free: FreeBlocks,
    /// How many owners each block has.
    holders: Vec<u32>,
    tree: PrefixTree,
    remembered: Remembered,
    listeners: Listeners,
    stats: Stats,
    /// How often everything was forgotten. What was computed before is not cached after.
    epoch: u64,
    block_size: usize,
}

/// A count that has come this far is not kept any more: the block is never freed. Four thousand million holders are a leak,
/// and a count that wraps would give the block to another sequence.
const UNCOUNTED: u32 = u32::MAX;

/// What an allocation leaves to do without the lock.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Taken {
    /// How many of the blocks, the last ones, were remembered until now, and still have their old content.
    pub(crate) evicted: usize,
    /// Blocks that were forgotten with their prefix, held by the caller, who is to free them.
    pub(crate) forgotten: Vec<BlockId>,
}

impl Ledger {
    pub(crate) fn new(blocks: usize, block_size: usize) -> Self {
        Self {
            free: FreeBlocks::all(blocks),
            holders: vec![0; blocks],
            tree: PrefixTree::new(blocks, block_size),
            remembered: Remembered::none(blocks),
            listeners: Listeners::default(),
            stats: Stats::default(),
            epoch: 0,
            block_size,
        }
    }

    /// How many blocks a request can get: the free ones, and the remembered ones, which give way.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.remembered.len()
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn remembered(&self) -> usize {
        self.remembered.len()
    }

    pub(crate) fn stats(&self) -> Stats {
        self.stats
    }

    /// Takes `n` blocks, free ones first, side by side where possible and right after `after`; all or none. Hands them to
    /// `taken` in runs of neighbours.
    #[inline]
    pub(crate) fn take(
        &mut self,
        n: usize,
        after: Option<BlockId>,
        mut taken: impl FnMut(Range<usize>),
    ) -> Result<Taken, OutOfBlocks> {
        let available = self.available();
        if n > available {
            return Err(OutOfBlocks { requested: n, available });
        }
        let free = n.min(self.free.len());
        let holders = &mut self.holders;
        self.free.take(free, after, |run| {
            holders[run.clone()].fill(1);
            taken(run);
        });
        let mut rest = Taken { evicted: n - free, forgotten: Vec::new() };
        for _ in free..n {
            let Some(id) = self.evict(&mut rest.forgotten) else { break };
            self.holders[id.index()] = 1;
            taken(id.index()..id.index() + 1);
        }
        Ok(rest)
    }

    /// Takes the remembered block that is next to give way. It is the one that was let go longest ago, and never one that is
    /// needed to find another: a sequence lets its blocks go from its end to its start, so that what follows a block was let
    /// go before it, or is followed by what a window, or a sequence that was written anew, has left there.
    fn evict(&mut self, forgotten: &mut Vec<BlockId>) -> Option<BlockId> {
        let victim = self.remembered.next_victim()?;
        self.remembered.remove(victim);
        self.forget(victim);
        self.stats.evictions += 1;
        while self.tree.has_too_many_tombstones() {
            let Some(lost) = self.tree.forget_coldest() else { break };
            let Some(id) = lost else { continue };
            self.listeners.tell(|| PoolEvent::Removed { block: id });
            if self.holders[id.index()] == 0 {
                self.hold(id);
                forgotten.push(id);
            }
        }
        Some(victim)
    }

    /// The block cannot be found any more.
    fn forget(&mut self, id: BlockId) {
        if self.tree.lose(id) {
            self.listeners.tell(|| PoolEvent::Removed { block: id });
        }
    }

    pub(crate) fn share(&mut self, ids: &[BlockId]) {
        for id in ids {
            let holders = &mut self.holders[id.index()];
            *holders = holders.saturating_add(1);
        }
    }

    /// One holder more for a block that may be remembered.
    #[inline]
    fn hold(&mut self, id: BlockId) {
        let holders = &mut self.holders[id.index()];
        if *holders == 0 {
            self.remembered.remove(id);
        }
        *holders = holders.saturating_add(1);
    }

    /// One holder less for each block, from the last to the first: the tail of a sequence is evicted before its head.
    #[inline]
    pub(crate) fn release(&mut self, ids: &[BlockId]) {
        let mut pending = Pending::default();
        for &id in ids.iter().rev() {
            let holders = &mut self.holders[id.index()];
            if *holders != 1 {
                *holders -= u32::from(*holders != UNCOUNTED);
                continue;
            }
            *holders = 0;
            if self.tree.contains(id) {
                self.remembered.insert(id);
            } else {
                self.free.insert_with(&mut pending, id);
            }
        }
        self.free.finish(pending);
    }

    /// Like [`release`](Self::release), but those that would become free are returned instead, still held.
    pub(crate) fn release_but_free(&mut self, ids: &[BlockId]) -> Vec<BlockId> {
        let mut still_held = Vec::new();
        for id in ids.iter().rev() {
            if self.holders[id.index()] == 1 && !self.tree.contains(*id) {
                still_held.push(*id);
            } else {
                self.release(&[*id]);
            }
        }
        still_held
    }

    /// Notes that a sequence lets these blocks go and keeps what follows them: they may be evicted before that.
    pub(crate) fn pass(&mut self, ids: &[BlockId]) {
        self.tree.pass(ids);
    }
}
