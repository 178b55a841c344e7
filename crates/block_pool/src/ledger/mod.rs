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
    /// Remembered blocks whose prefix was forgotten during an eviction: held once, for the next that is taken, and the rest by
    /// the caller of that allocation, who is to free them.
    orphaned: Vec<BlockId>,
}

/// A count that grows beyond this is set back to it. Counts are far below as long as every list is dropped: more lists than
/// this take hundreds of gigabytes. It is for those that are forgotten (`std::mem::forget`), whose blocks are never freed, and
/// must not become so by a count that wraps.
const MOST_HOLDERS: u32 = 0xf000_0000;

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
            orphaned: Vec::new(),
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
    /// `taken` in runs of neighbours, and returns how many of them, the last ones, were remembered until now and have their old
    /// content. If any were, the caller asks for those that are [orphaned](Self::take_orphaned).
    #[inline]
    pub(crate) fn take(
        &mut self,
        n: usize,
        after: Option<BlockId>,
        mut taken: impl FnMut(Range<usize>),
    ) -> Result<usize, OutOfBlocks> {
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
        let mut evicted = 0;
        while free + evicted < n {
            // What was orphaned was among those that are available, too.
            let Some(id) = self.orphaned.pop().or_else(|| self.evict()) else { break };
            self.holders[id.index()] = 1;
            taken(id.index()..id.index() + 1);
            evicted += 1;
        }
        debug_assert_eq!(free + evicted, n, "as many are available as were counted");
        Ok(evicted)
    }

    /// Whether there are blocks that the one who has allocated is to free.
    pub(crate) fn has_orphaned(&self) -> bool {
        !self.orphaned.is_empty()
    }

    /// Blocks that are held by nobody but the caller, who is to free them: what an eviction has forgotten of other prefixes.
    pub(crate) fn take_orphaned(&mut self) -> Vec<BlockId> {
        std::mem::take(&mut self.orphaned)
    }

    /// Takes the remembered block that is next to give way. It is the one that was let go longest ago, and never one that is
    /// needed to find another: a sequence lets its blocks go from its end to its start, so that what follows a block was let
    /// go before it, or is followed by what a window, or a sequence that was written anew, has left there.
    #[inline]
    fn evict(&mut self) -> Option<BlockId> {
        let victim = self.remembered.next_victim()?;
        self.remembered.remove(victim);
        self.forget(victim);
        self.stats.evictions += 1;
        Some(victim)
    }

    #[cold]
    fn forget_cold_prefixes(&mut self) {
        while self.tree.has_too_many_tombstones() {
            let Some(lost) = self.tree.forget_coldest() else { return };
            let Some(id) = lost else { continue };
            self.listeners.tell(|| PoolEvent::Removed { block: id });
            if self.holders[id.index()] == 0 {
                self.hold(id);
                self.orphaned.push(id);
            }
        }
    }

    /// The block cannot be found any more. What of it stays in the tree may be too much.
    #[inline]
    fn forget(&mut self, id: BlockId) {
        if self.tree.lose(id) {
            self.listeners.tell(|| PoolEvent::Removed { block: id });
        }
        if self.tree.has_too_many_tombstones() {
            self.forget_cold_prefixes();
        }
    }

    /// One holder more for each of these blocks, which somebody holds.
    pub(crate) fn share(&mut self, ids: &[BlockId]) {
        let mut any = 0;
        for id in ids {
            let holders = &mut self.holders[id.index()];
            *holders += 1;
            any |= *holders;
        }
        if any > MOST_HOLDERS {
            self.limit(ids);
        }
    }

    /// One holder more for a block that may be remembered.
    #[inline]
    fn hold(&mut self, id: BlockId) {
        let holders = &mut self.holders[id.index()];
        if *holders == 0 {
            self.remembered.remove(id);
        }
        *holders = MOST_HOLDERS.min(*holders + 1);
    }

    #[cold]
    fn limit(&mut self, ids: &[BlockId]) {
        for id in ids {
            let holders = &mut self.holders[id.index()];
            *holders = MOST_HOLDERS.min(*holders);
        }
    }

    /// One holder less for each block, from the last to the first: the tail of a sequence is evicted before its head.
    #[inline]
    pub(crate) fn release(&mut self, ids: &[BlockId]) {
        let mut pending = Pending::default();
        for &id in ids.iter().rev() {
            let holders = &mut self.holders[id.index()];
            *holders -= 1;
            if *holders > 0 {
                continue;
            }
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
