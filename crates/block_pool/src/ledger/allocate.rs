//! Allocating blocks, and evicting cached ones for it.

use std::ops::Range;

use super::Ledger;
use crate::prefix::Entry;
use crate::{BlockId, KvEvent, OutOfBlocks};

/// Blocks with a ref_count of 1 whose content must be dealt with outside of the lock, before they are freed.
#[derive(Debug, Default)]
pub(crate) struct Leftovers {
    /// Blocks that have lost their place in the tree: to be poisoned. Each with its group.
    pub(crate) evicted: Vec<(usize, BlockId)>,
    /// Blocks that were free, and whose memory another group needs: to be given back to the system.
    pub(crate) unneeded: Vec<(usize, BlockId)>,
}

impl Leftovers {
    pub(crate) fn is_empty(&self) -> bool {
        self.evicted.is_empty() && self.unneeded.is_empty()
    }
}

impl Ledger {
    /// Does the same as [`allocate`](Self::allocate), if the budget has room.
    #[inline]
    pub(crate) fn allocate_checked(
        &mut self,
        group: usize,
        n: usize,
        after: Option<BlockId>,
        add_run: impl FnMut(Range<usize>),
    ) -> Result<usize, OutOfBlocks> {
        let (requested, available) = (n.saturating_mul(self.groups[group].units), self.available());
        if requested > available {
            return Err(OutOfBlocks { requested, available });
        }
        Ok(self.allocate(group, n, after, add_run))
    }

    /// Allocates `n` blocks of a group: free ones first, adjacent where possible, and directly after `after`. Passes them
    /// to `add_run` in runs of adjacent blocks. Returns how many of them, the last ones, were evicted for this and have
    /// their old content. The caller has checked that the budget has room, and deals with the
    /// [leftovers](Self::take_leftovers).
    #[inline]
    pub(super) fn allocate(
        &mut self,
        group: usize,
        n: usize,
        after: Option<BlockId>,
        mut add_run: impl FnMut(Range<usize>),
    ) -> usize {
        let free_units = self.free_units() + self.units_of(&self.leftovers.evicted);
        let own = &mut self.groups[group];
        let (first, units) = (own.first, own.units);
        let free = n.min(own.free.len()).min(if units == 1 { free_units } else { free_units / units });
        let (ref_counts, resident) = (&mut self.ref_counts, &mut own.resident);
        own.free.allocate(free, after, |run| {
            ref_counts[first + run.start..first + run.end].fill(1);
            if let Some(resident) = resident {
                resident.insert(run.clone());
            }
            add_run(run);
        });
        self.units_in_use += free * units;
        let mut evicted = 0;
        while free + evicted < n {
            let Some(id) = self.reclaim(group) else { break };
            add_run(id.index()..id.index() + 1);
            evicted += 1;
        }
        debug_assert_eq!(free + evicted, n, "as many blocks are available as were counted");
        if self.groups.len() > 1 {
            self.give_back(group);
        }
        evicted
    }

    /// The units of blocks that count as in use only until the caller has dealt with them.
    fn units_of(&self, blocks: &[(usize, BlockId)]) -> usize {
        blocks.iter().map(|&(group, _)| self.groups[group].units).sum()
    }

    /// Allocates one block of a group by evicting: a block of this group, or as many of other groups as take its units.
    fn reclaim(&mut self, group: usize) -> Option<BlockId> {
        loop {
            // Blocks that lost their prefix together with an evicted one were counted as available, too.
            if let Some(at) = self.leftovers.evicted.iter().position(|&(of, _)| of == group) {
                return Some(self.leftovers.evicted.swap_remove(at).1);
            }
            let units = self.groups[group].units;
            if self.groups.len() > 1 && self.free_units() + self.units_of(&self.leftovers.evicted) >= units {
                // The group has a free block: blocks of all its memory would take more than the budget.
                let mut id = None;
                self.groups[group].free.allocate(1, None, |run| id = Some(BlockId::new(run.start)));
                let id = id?;
                let entry = self.entry(group, id);
                self.ref_counts[entry] = 1;
                if let Some(resident) = &mut self.groups[group].resident {
                    resident.insert(id.index()..id.index() + 1);
                }
                self.units_in_use += units;
                return Some(id);
            }
            let victim = self.evictable.next_victim()?;
            let (of, id) = self.block(victim);
            self.use_evictable(of, victim);
            self.ref_counts[victim] = 1;
            self.uncache(of, victim);
            self.stats.evictions += 1;
            if of == group {
                return Some(id);
            }
            self.leftovers.evicted.push((of, id));
        }
    }

    /// Notes that an evictable block is in use from now on.
    #[inline]
    pub(super) fn use_evictable(&mut self, group: usize, entry: Entry) {
        self.evictable.remove(entry);
        let of = &mut self.groups[group];
        of.evictable -= 1;
        self.units_evictable -= of.units;
        self.units_in_use += of.units;
    }

    /// Takes the block out of the tree. If there are too many tombstones then, the coldest prefixes are dropped.
    #[inline]
    pub(super) fn uncache(&mut self, group: usize, entry: Entry) {
        if self.tree.remove_block(group, entry) {
            let block = BlockId::new(entry - self.groups[group].first);
            self.subscribers.publish(|| KvEvent::BlockRemoved { group, block });
        }
        if self.tree.has_too_many_tombstones() {
            self.drop_cold_prefixes();
        }
    }

    #[cold]
    fn drop_cold_prefixes(&mut self) {
        while self.tree.has_too_many_tombstones() {
            let Some(dropped) = self.tree.drop_coldest() else { return };
            for (group, block) in dropped {
                self.subscribers.publish(|| KvEvent::BlockRemoved { group, block });
                let entry = self.entry(group, block);
                if self.ref_counts[entry] == 0 {
                    self.use_evictable(group, entry);
                    self.ref_counts[entry] = 1;
                    self.leftovers.evicted.push((group, block));
                }
            }
        }
    }

    /// Whether there are blocks that the caller has to deal with.
    #[inline]
    pub(crate) fn has_leftovers(&self) -> bool {
        !self.leftovers.is_empty()
    }

    /// The blocks that the caller has to deal with outside of the lock, and then frees.
    pub(crate) fn take_leftovers(&mut self) -> Leftovers {
        std::mem::take(&mut self.leftovers)
    }
}
