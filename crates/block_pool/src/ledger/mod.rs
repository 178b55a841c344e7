//! The pool's bookkeeping under one lock: the free blocks, the ref_count of each block, and the cached blocks.
//!
//! They share a lock so that "its ref_count is 0" and "it is free" become true at the same instant: no thread ever sees
//! a block that is neither in use, nor evictable, nor free.
//!
//! | | ref_count | cached in the tree |
//! |---|---|---|
//! | free | 0 | no |
//! | evictable | 0 | yes |
//! | in use | 1 or more | maybe |
//!
//! - this file: allocating, forking, freeing, evicting;
//! - `write`: making a block writable;
//! - `cache`: matching prefixes, and caching blocks;
//! - `check`: whether all of it is consistent.

mod cache;
mod check;
mod write;

use std::ops::Range;

use crate::events::Subscribers;
use crate::eviction::EvictionList;
use crate::free::{FreeBlocks, Pending};
use crate::prefix::PrefixTree;
use crate::{BlockId, KvEvent, OutOfBlocks, Stats};

pub(crate) use cache::Query;
pub(crate) use write::Writable;

#[derive(Debug)]
pub(crate) struct Ledger {
    free: FreeBlocks,
    /// How many lists use each block.
    ref_counts: Vec<u32>,
    tree: PrefixTree,
    evictable: EvictionList,
    subscribers: Subscribers,
    stats: Stats,
    /// How many resets of the prefix cache there have been. A list that got its first block in an earlier epoch caches
    /// nothing.
    epoch: u64,
    block_size: usize,
    /// Blocks that were evictable and have lost their prefix during an eviction, because there were too many
    /// tombstones. Their ref_count is 1. The allocation that evicts uses them first; its caller frees the rest.
    orphaned: Vec<BlockId>,
}

/// A ref_count that grows beyond this is set back to it. As long as every list is dropped no ref_count comes near: more
/// lists than this take hundreds of gigabytes. The limit is for lists that are leaked by `std::mem::forget`: their
/// blocks are never freed, and a ref_count that wraps must not free them.
const MAX_REF_COUNT: u32 = 0xf000_0000;

impl Ledger {
    pub(crate) fn new(blocks: usize, block_size: usize) -> Self {
        Self {
            free: FreeBlocks::all(blocks),
            ref_counts: vec![0; blocks],
            tree: PrefixTree::new(blocks, block_size),
            evictable: EvictionList::empty(blocks),
            subscribers: Subscribers::default(),
            stats: Stats::default(),
            epoch: 0,
            block_size,
            orphaned: Vec::new(),
        }
    }

    /// How many blocks can be allocated: the free ones, and the evictable ones.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.evictable.len()
    }

    pub(crate) fn free_blocks(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn evictable(&self) -> usize {
        self.evictable.len()
    }

    pub(crate) fn stats(&self) -> Stats {
        self.stats
    }

    /// Allocates `n` blocks or none: free ones first, adjacent where possible, and directly after `after`. Passes them
    /// to `add_run` in runs of adjacent blocks. Returns how many of them, the last ones, were evicted for this and have
    /// their old content. If any were, the caller calls [`drain_orphaned`](Self::drain_orphaned) and frees those
    /// blocks.
    #[inline]
    pub(crate) fn allocate(
        &mut self,
        n: usize,
        after: Option<BlockId>,
        mut add_run: impl FnMut(Range<usize>),
    ) -> Result<usize, OutOfBlocks> {
        let available = self.available();
        if n > available {
            return Err(OutOfBlocks { requested: n, available });
        }
        let free = n.min(self.free.len());
        let ref_counts = &mut self.ref_counts;
        self.free.allocate(free, after, |run| {
            ref_counts[run.clone()].fill(1);
            add_run(run);
        });
        let mut evicted = 0;
        while free + evicted < n {
            // Orphaned blocks were counted as available, too.
            let Some(id) = self.orphaned.pop().or_else(|| self.evict()) else { break };
            self.ref_counts[id.index()] = 1;
            add_run(id.index()..id.index() + 1);
            evicted += 1;
        }
        debug_assert_eq!(free + evicted, n, "as many blocks are available as were counted");
        Ok(evicted)
    }

    /// Whether there are orphaned blocks, which the caller of the allocation frees.
    pub(crate) fn has_orphaned(&self) -> bool {
        !self.orphaned.is_empty()
    }

    /// The blocks that lost their prefix in an eviction, for the caller to free: their ref_count is 1.
    pub(crate) fn drain_orphaned(&mut self) -> Vec<BlockId> {
        std::mem::take(&mut self.orphaned)
    }

    /// Evicts the least recently used block and returns it. No other block needs it to be found: a sequence frees its
    /// blocks from its end to its start, so the blocks that follow this one in the tree were freed and evicted earlier.
    /// The exceptions are blocks that were left there by a sequence with a window, or by one that has replaced this
    /// block.
    #[inline]
    fn evict(&mut self) -> Option<BlockId> {
        let victim = self.evictable.next_victim()?;
        self.evictable.remove(victim);
        self.uncache(victim);
        self.stats.evictions += 1;
        Some(victim)
    }

    #[cold]
    fn drop_cold_prefixes(&mut self) {
        while self.tree.has_too_many_tombstones() {
            let Some(dropped) = self.tree.drop_coldest() else { return };
            let Some(id) = dropped else { continue };
            self.subscribers.publish(|| KvEvent::BlockRemoved { block: id });
            if self.ref_counts[id.index()] == 0 {
                self.add_ref(id);
                self.orphaned.push(id);
            }
        }
    }

    /// Takes the block out of the tree. If there are too many tombstones then, the coldest prefixes are dropped.
    #[inline]
    fn uncache(&mut self, id: BlockId) {
        if self.tree.remove_block(id) {
            self.subscribers.publish(|| KvEvent::BlockRemoved { block: id });
        }
        if self.tree.has_too_many_tombstones() {
            self.drop_cold_prefixes();
        }
    }

    /// Increments the ref_count of each of these blocks, which are in use.
    pub(crate) fn add_refs(&mut self, ids: &[BlockId]) {
        let mut any = 0;
        for id in ids {
            let ref_count = &mut self.ref_counts[id.index()];
            *ref_count += 1;
            any |= *ref_count;
        }
        if any > MAX_REF_COUNT {
            self.limit(ids);
        }
    }

    /// Increments the ref_count of a block that may be evictable.
    #[inline]
    fn add_ref(&mut self, id: BlockId) {
        let ref_count = &mut self.ref_counts[id.index()];
        if *ref_count == 0 {
            self.evictable.remove(id);
        }
        *ref_count = MAX_REF_COUNT.min(*ref_count + 1);
    }

    #[cold]
    fn limit(&mut self, ids: &[BlockId]) {
        for id in ids {
            let ref_count = &mut self.ref_counts[id.index()];
            *ref_count = MAX_REF_COUNT.min(*ref_count);
        }
    }

    /// Decrements the ref_count of each block, from the last to the first: the tail of a sequence is evicted before its
    /// head.
    #[inline]
    pub(crate) fn free(&mut self, ids: &[BlockId]) {
        let mut pending = Pending::default();
        for &id in ids.iter().rev() {
            let ref_count = &mut self.ref_counts[id.index()];
            *ref_count -= 1;
            if *ref_count > 0 {
                continue;
            }
            if self.tree.contains(id) {
                self.evictable.insert(id);
            } else {
                self.free.insert_with(&mut pending, id);
            }
        }
        self.free.finish(pending);
    }

    /// Does the same as [`free`](Self::free), but returns the blocks that would become free, with a ref_count of 1.
    pub(crate) fn free_except_last_refs(&mut self, ids: &[BlockId]) -> Vec<BlockId> {
        let mut unfreed = Vec::new();
        for id in ids.iter().rev() {
            if self.ref_counts[id.index()] == 1 && !self.tree.contains(*id) {
                unfreed.push(*id);
            } else {
                self.free(&[*id]);
            }
        }
        unfreed
    }

    /// Notes that a sequence frees these blocks and keeps using the blocks that follow. The freed ones may be evicted
    /// first.
    pub(crate) fn mark_passed(&mut self, ids: &[BlockId]) {
        self.tree.mark_passed(ids);
    }
}
