//! Freeing blocks: at the end, before a window, and what is kept when a sequence ends.

use smallvec::SmallVec;

use super::Blocks;
use crate::ledger::Why;
use crate::list::{Ids, List};
use crate::{GroupBlock, OutOfWindow};

/// Among how many of its last blocks the last full one of a sequence is searched for.
const LAST_BLOCKS: usize = 8;

impl Blocks {
    /// Keeps the blocks before number `end` and frees the others. Does nothing if there are none. Blocks before those
    /// that a window has freed are kept: [`go_back`](Self::go_back) frees them.
    #[inline]
    pub fn truncate(&mut self, end: usize) {
        if self.others().is_empty() {
            let freed = self.first.freed;
            return self.truncate_group(0, self.after_freed(end).saturating_sub(freed));
        }
        let end = self.after_freed(end);
        self.truncate_lists(|list, _| end.saturating_sub(list.freed));
    }

    /// Keeps the first blocks of each list, as many as `len` says; it gets the list and the number of the group. All lists
    /// are shorter before any block is freed, so that they agree even if the storage panics.
    fn truncate_lists(&mut self, len: impl Fn(&mut List, usize) -> usize) {
        let mut freed = SmallVec::<[(usize, Ids); 4]>::new();
        for group in self.groups() {
            let list = self.list_mut(group);
            let len = len(list, group).min(list.ids.len());
            freed.push((group, list.ids.drain(len..).collect()));
        }
        self.pool.free_lists(freed.iter().map(|(group, ids)| (*group, &ids[..])), Why::Ended);
    }

    /// Keeps the first `len` blocks of a list.
    #[inline]
    pub(super) fn truncate_group(&mut self, group: usize, len: usize) {
        let (pool, list) = self.pool_and_list(group);
        let had = list.ids.len();
        if len < had {
            pool.free_range(group, &mut list.ids, len..had, Why::Ended);
        }
    }

    /// `end`, or the number after the freed blocks of any group, if that is larger.
    #[inline]
    pub(super) fn after_freed(&self, end: usize) -> usize {
        let after = |group| match self.list(group) {
            Some(list) if list.freed > 0 => self.freed(group).end,
            _ => 0,
        };
        self.groups().map(after).fold(end, usize::max)
    }

    /// Whether the sequence can go back to its first `len` tokens.
    ///
    /// # Errors
    ///
    /// As [`go_back`](Self::go_back).
    pub fn check_go_back(&self, len: usize) -> Result<(), OutOfWindow> {
        self.freed_at(len).map(drop)
    }

    /// Keeps what a sequence of the first `len` tokens has.
    ///
    /// # Errors
    ///
    /// [`OutOfWindow`] when a window has freed a block that the next token would see; then nothing changes.
    pub fn go_back(&mut self, len: usize) -> Result<(), OutOfWindow> {
        let freed = self.freed_at(len)?;
        let blocks = self.pool.blocks_for(len);
        let sinks: SmallVec<[usize; 4]> = self.groups().map(|group| self.sink_blocks(group)).collect();
        self.truncate_lists(|list, group| {
            let before = std::mem::replace(&mut list.freed, freed[group]);
            let most = if freed[group] < before { sinks[group] } else { usize::MAX };
            most.min(blocks.saturating_sub(freed[group]))
        });
        Ok(())
    }

    /// For each group, how many of the first blocks of a sequence of the first `len` tokens are freed: as many as now, or
    /// none if it ends before the freed ones.
    pub(super) fn freed_at(&self, len: usize) -> Result<SmallVec<[usize; 4]>, OutOfWindow> {
        let block_size = self.pool.block_size();
        let of = |group: usize| {
            let freed = self.list(group).map_or(0, |list| list.freed);
            if freed == 0 {
                return Ok(0);
            }
            let (span, sinks) = (self.span(group), self.sink_blocks(group));
            // If the group has no window, the caller stores the freed tokens elsewhere: only `len` itself must not lie
            // among them.
            let needed = if span.is_all() { len } else { span.start(len) };
            let kept = (sinks + freed).saturating_mul(block_size);
            match len {
                _ if len <= sinks.saturating_mul(block_size) => Ok(0),
                _ if needed >= kept => Ok(freed),
                _ => Err(OutOfWindow { len, needed, kept }),
            }
        };
        self.groups().map(of).collect()
    }

    /// Frees the blocks that no token after the first `len` tokens sees.
    #[inline]
    pub fn free_invisible(&mut self, len: usize) {
        if self.is_simple() {
            return;
        }
        for group in self.groups() {
            let span = self.span(group);
            if !span.is_all() {
                let block_size = self.pool.block_size();
                let passed = span.freed_blocks(len, block_size);
                self.free_after(group, span.sink_blocks(block_size), passed, Why::Passed);
            }
        }
    }

    /// Frees the blocks before number `end`, for sequences whose first tokens are stored elsewhere from now on. Does
    /// nothing if a group has a window.
    pub fn free_before(&mut self, end: usize) {
        if self.groups().all(|group| self.span(group).is_all()) {
            for group in self.groups() {
                self.free_after(group, 0, end, Why::Ended);
            }
        }
    }

    /// Frees the first `passed` blocks after `sinks` of a list, unless they are freed already.
    pub(super) fn free_after(&mut self, group: usize, sinks: usize, passed: usize, why: Why) {
        let (pool, list) = self.pool_and_list(group);
        if passed <= list.freed {
            return;
        }
        let range = sinks.min(list.ids.len())..(sinks + passed - list.freed).min(list.ids.len());
        list.freed = passed;
        if !range.is_empty() {
            pool.ledger().mark_passed(group, &list.ids[range.clone()]);
            pool.free_range(group, &mut list.ids, range, why);
        }
    }

    /// The number of the last block that is cached, out of the last few, and that block in any group that has it.
    pub(super) fn last_cached(&self) -> Option<(usize, GroupBlock)> {
        let ledger = self.pool.ledger();
        // The last block is not full, and reserved ones may follow it.
        (0..self.end()).rev().take(LAST_BLOCKS).find_map(|number| {
            let of = |group| Some(GroupBlock { group, block: self.block(group, number)? });
            let last = self.groups().filter_map(of).find(|last| ledger.is_cached_block(*last))?;
            Some((number, last))
        })
    }

    /// The sequence ends: what its window has passed since its last full block, `number`, was filled is evicted as late as
    /// what it has not passed, and so is the last block before that. A later sequence that finds the full blocks sees all
    /// of it.
    pub(super) fn keep_for_full_blocks(&self, group: usize, (number, last): (usize, GroupBlock)) {
        let (span, block_size) = (self.span(group), self.pool.block_size());
        let Some(list) = self.list(group).filter(|list| list.freed > 0) else { return };
        let (full, sinks) = (number + 1, span.sink_blocks(block_size));
        let passed = (sinks + list.freed).min(full);
        let kept = (sinks + span.freed_blocks(full * block_size, block_size)).min(passed.saturating_sub(1));
        self.pool.ledger().keep(group, last, full - passed..full - kept);
    }
}
