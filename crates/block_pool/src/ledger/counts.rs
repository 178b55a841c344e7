//! Using blocks that others use too, and freeing them.

use super::{Ledger, MAX_REF_COUNT};
use crate::BlockId;
use crate::free::Pending;
use crate::prefix::Entry;

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
        let first = self.groups[group].first;
        let mut pending = Pending::default();
        let (mut freed, mut evictable) = (0, 0);
        for &id in ids.iter().rev() {
            let entry = first + id.index();
            let ref_count = &mut self.ref_counts[entry];
            *ref_count -= 1;
            if *ref_count > 0 {
                continue;
            }
            freed += 1;
            if self.tree.contains(entry) {
                evictable += 1;
                if why == Why::Passed && !self.tree.is_near_branch(entry) {
                    self.evictable.insert_passed(entry);
                } else {
                    self.evictable.insert(entry);
                }
            } else {
                self.groups[group].free.insert_with(&mut pending, id);
            }
        }
        let of = &mut self.groups[group];
        of.free.finish(pending);
        of.evictable += evictable;
        self.units_in_use -= freed * of.units;
        self.units_evictable += evictable * of.units;
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

    /// Notes that a sequence frees these blocks and keeps using the blocks that follow. The freed ones may be evicted
    /// first.
    pub(crate) fn mark_passed(&mut self, group: usize, ids: &[BlockId]) {
        for id in ids {
            self.tree.mark_passed(self.groups[group].first + id.index());
        }
    }
}
