//! Using blocks that others use too, and freeing them.

use super::{Group, Ledger, MAX_REF_COUNT};
use std::ops::Range;

use crate::free::Pending;
use crate::prefix::Entry;
use crate::{BlockId, GroupBlock};

/// Why blocks are freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// The sequence ends, or goes back.
    Ended,
    /// The window of the sequence has passed them. They are evicted before all others, unless other sequences part close
    /// after them.
    Passed,
}

impl Ledger {
    /// Increments the ref_count of each of these blocks, which are in use.
    pub(crate) fn add_refs(&mut self, group: usize, ids: &[BlockId]) {
        let first = self.groups[group].first;
        let mut any = 0;
        for id in ids {
            let ref_count = &mut self.ref_counts[first + id.index()];
            *ref_count += 1;
            any |= *ref_count;
        }
        if any > MAX_REF_COUNT {
            self.limit(first, ids);
        }
    }

    /// Increments the ref_count of a block that may be evictable.
    #[inline]
    pub(super) fn add_ref(&mut self, group: usize, entry: Entry) {
        if self.ref_counts[entry] == 0 {
            self.use_evictable(group, entry);
        }
        let ref_count = &mut self.ref_counts[entry];
        *ref_count = MAX_REF_COUNT.min(*ref_count + 1);
    }

    #[cold]
    fn limit(&mut self, first: Entry, ids: &[BlockId]) {
        for id in ids {
            let ref_count = &mut self.ref_counts[first + id.index()];
            *ref_count = MAX_REF_COUNT.min(*ref_count);
        }
    }

    /// Decrements the ref_count of each block, from the last to the first: the tail of a sequence is evicted before its
    /// head.
    #[inline]
    pub(crate) fn free(&mut self, group: usize, ids: &[BlockId], why: Why) {
        let several = self.groups.len() > 1;
        let Self { groups, ref_counts, tree, evictable, .. } = self;
        let Group { first, free, .. } = &mut groups[group];
        let (free_before, evictable_before) = (free.len(), evictable.len());
        let mut pending = Pending::default();
        for &id in ids.iter().rev() {
            let entry = *first + id.index();
            let ref_count = &mut ref_counts[entry];
            *ref_count -= 1;
            if *ref_count > 0 {
                continue;
            }
            if tree.contains(entry) {
                let passed = why == Why::Passed && !tree.is_near_branch(entry);
                evictable.insert(entry, passed);
            } else {
                free.insert_with(&mut pending, id);
            }
        }
        free.finish(pending);
        let (freed, kept) = (free.len() - free_before, evictable.len() - evictable_before);
        let of = &mut groups[group];
        self.units_in_use -= (freed + kept) * of.units;
        if kept > 0 {
            if several {
                of.evictable += kept;
            }
            self.units_evictable += kept * of.units;
        }
    }

    /// Does the same as [`free`](Self::free), but returns the blocks that would become free, with a ref_count of 1.
    pub(crate) fn free_except_last_refs(&mut self, group: usize, ids: &[BlockId], why: Why) -> Vec<BlockId> {
        let mut unfreed = Vec::new();
        for id in ids.iter().rev() {
            let entry = self.entry(group, *id);
            if self.ref_counts[entry] == 1 && !self.tree.contains(entry) {
                unfreed.push(*id);
            } else {
                self.free(group, &[*id], why);
            }
        }
        unfreed
    }

    pub(crate) fn is_cached_block(&self, of: GroupBlock) -> bool {
        self.tree.contains(self.entry(of.group, of.block))
    }

    /// Treats blocks of a group, those that are evictable, as ones that no window has passed: those this many steps before
    /// a cached block, in the prefix that it is cached under.
    pub(crate) fn keep(&mut self, group: usize, last: GroupBlock, back: Range<usize>) {
        let last = self.entry(last.group, last.block);
        for block in self.tree.blocks_before(group, last, back) {
            let entry = self.entry(group, block);
            if self.ref_counts[entry] == 0 {
                self.evictable.remove(entry);
                self.evictable.insert(entry, false);
            }
        }
    }

    /// Notes that a sequence frees these blocks and keeps using the blocks that follow. The freed ones may be evicted
    /// first.
    pub(crate) fn mark_passed(&mut self, group: usize, ids: &[BlockId]) {
        for id in ids {
            self.tree.mark_passed(group, self.groups[group].first + id.index());
        }
    }
}
