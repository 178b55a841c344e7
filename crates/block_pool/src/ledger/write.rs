//! Making blocks writable that others may read, and allocating blocks after them, in all groups at once.

use smallvec::SmallVec;

use super::Ledger;
use crate::list::List;
use crate::{BlockId, OutOfBlocks};

/// How a block can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WriteMode {
    /// Only the caller uses it, and it is not cached; or there is no such block.
    InPlace,
    /// Other lists use it, or it is cached: the caller writes to a copy.
    Copy,
    /// Only the caller uses it, but it is cached, and there is no room for a copy: it is uncached, then written. The
    /// running sequence needs the memory now; a sequence that would match the block may never come.
    Uncache,
}

/// What was allocated in one group.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Reservation {
    /// The block whose copy is the first of the new blocks.
    pub(crate) copied: Option<BlockId>,
    /// How many of the new blocks, the last ones, were evicted for this and have their old content.
    pub(crate) evicted: usize,
}

/// How many available blocks it costs to write to a block that `others` other lists use. If there are none, the block
/// is written in place, or it is copied and the original becomes evictable.
pub(super) fn cost_of_copy(others: u32) -> usize {
    usize::from(others > 0)
}

impl Ledger {
    /// Makes one block of each list writable, `at(group)` if there is one, and adds `n(group)` blocks to each list. The
    /// copies are added before them. There is room in the lists for their ids.
    ///
    /// If there is no room for everything, nothing changes.
    #[inline]
    pub(crate) fn reserve(
        &mut self,
        lists: &mut [List],
        at: impl Fn(usize, &List) -> Option<usize>,
        n: impl Fn(usize) -> usize,
    ) -> Result<SmallVec<[Reservation; 1]>, OutOfBlocks> {
        let available = self.available();
        let mut modes = SmallVec::<[(Option<BlockId>, WriteMode); 1]>::new();
        let (mut requested, mut saved) = (0usize, 0);
        for (group, list) in lists.iter().enumerate() {
            let block = at(group, list).map(|at| list.ids[at]);
            let mode = block.map_or(WriteMode::InPlace, |id| self.write_mode(group, id));
            let units = self.groups[group].units;
            let copy = usize::from(mode == WriteMode::Copy);
            requested = requested.saturating_add(n(group).saturating_add(copy).saturating_mul(units));
            if copy == 1 && block.is_some_and(|id| self.ref_counts[self.entry(group, id)] == 1) {
                saved += units;
            }
            modes.push((block, mode));
        }
        let uncaches = requested > available && saved > 0;
        if uncaches {
            requested -= saved;
        }
        if requested > available {
            return Err(OutOfBlocks { requested, available });
        }
        let mut reserved = SmallVec::new();
        for (group, (list, (block, mode))) in lists.iter_mut().zip(modes).enumerate() {
            let mode = match block {
                Some(id) if uncaches && mode == WriteMode::Copy && self.ref_counts[self.entry(group, id)] == 1 => {
                    WriteMode::Uncache
                }
                _ => mode,
            };
            let copies = mode == WriteMode::Copy;
            let after = if copies { None } else { list.ids.last().copied() };
            let ids = &mut list.ids;
            let evicted = self.allocate(group, n(group) + usize::from(copies), after, |run| {
                if run.len() == 1 {
                    ids.push(BlockId::new(run.start));
                } else {
                    ids.extend(run.map(BlockId::new));
                }
            });
            if let (Some(id), WriteMode::Uncache) = (block, mode) {
                let entry = self.entry(group, id);
                if self.groups.len() > 1 {
                    self.evict_followers(group, entry);
                }
                // With one group, all evictable blocks that follow it have been evicted by now: there was no other room.
                self.uncache(group, entry);
            }
            reserved.push(Reservation { copied: block.filter(|_| copies), evicted });
        }
        if self.groups.len() > 1 {
            self.give_back(0);
        }
        Ok(reserved)
    }

    fn write_mode(&self, group: usize, id: BlockId) -> WriteMode {
        let entry = self.entry(group, id);
        match (self.ref_counts[entry], self.tree.contains(entry)) {
            (1, false) => WriteMode::InPlace,
            _ => WriteMode::Copy,
        }
    }

    /// Whether the block can be written as it is: only the caller uses it, and it is not cached.
    #[inline]
    pub(crate) fn is_writable(&self, group: usize, id: BlockId) -> bool {
        self.write_mode(group, id) == WriteMode::InPlace
    }

    /// How many available units [`reserve`](Self::reserve) takes in the end, which is also the least it needs, when each
    /// list's block to be written is given.
    pub(crate) fn reserve_cost(&self, blocks: impl Iterator<Item = Option<BlockId>>, n: usize) -> usize {
        let of = |(group, block): (usize, Option<BlockId>)| {
            let copy = block.map_or(0, |id| cost_of_copy(self.ref_counts[self.entry(group, id)] - 1));
            n.saturating_add(copy).saturating_mul(self.groups[group].units)
        };
        blocks.enumerate().map(of).fold(0, usize::saturating_add)
    }

    pub(crate) fn count_copy(&mut self) {
        self.stats.copies += 1;
    }
}
