//! Allocating blocks, and evicting cached ones for it.

use std::ops::Range;
use std::sync::Arc;

use super::{Group, Ledger};
use crate::offload::{Evictee, Queue};
use crate::prefix::{Entry, Lineage};
use crate::{BlockId, KvEvent, OutOfBlocks};

/// Blocks with a ref_count of 1 whose content must be dealt with outside of the lock, before they are freed.
#[derive(Debug, Default)]
pub(crate) struct Leftovers {
    /// Blocks that have lost their place in the tree: to be poisoned. Each with its group.
    pub(crate) evicted: Vec<(usize, BlockId)>,
    /// Blocks that were free, and whose memory another group needs: to be given back to the system.
    pub(crate) unneeded: Vec<(usize, BlockId)>,
    /// Blocks whose content goes to a tier. They are among those that were allocated, or among the others here.
    pub(crate) offloaded: Vec<Evictee>,
    /// Where their content goes. A later one may be for another model.
    pub(crate) queue: Option<Arc<Queue>>,
}

impl Leftovers {
    pub(crate) fn is_empty(&self) -> bool {
        self.evicted.is_empty() && self.unneeded.is_empty() && self.offloaded.is_empty()
    }
}

impl Ledger {
    /// Does the same as [`allocate`](Self::allocate) for the only group, if the budget has room.
    #[inline]
    pub(crate) fn allocate_checked(
        &mut self,
        n: usize,
        after: Option<BlockId>,
        add_run: impl FnMut(Range<usize>),
    ) -> Result<usize, OutOfBlocks> {
        let (requested, available) = (n.saturating_mul(self.groups.first.units), self.available());
        if requested > available {
            return Err(OutOfBlocks { requested, available });
        }
        Ok(self.allocate(0, n, after, add_run))
    }

    /// Allocates `n` blocks of a group: free ones first, adjacent where possible, and directly after `after`. Passes them
    /// to `add_run` in runs of adjacent blocks. Returns how many of them, the last ones, were evicted for this and have
    /// their old content. The caller has checked that the budget has room. When it has allocated everything, it calls
    /// [`give_back`](Self::give_back) if there are several groups, and deals with the
    /// [leftovers](Self::take_leftovers).
    #[inline]
    pub(super) fn allocate(
        &mut self,
        group: usize,
        n: usize,
        after: Option<BlockId>,
        mut add_run: impl FnMut(Range<usize>),
    ) -> usize {
        if self.groups.len() > 1 {
            return self.allocate_shared(group, n, after, &mut add_run);
        }
        // In a pool with one group the free blocks are the rest of the budget.
        let Group { free, units, .. } = &mut self.groups.first;
        let from_free = n.min(free.len());
        let ref_counts = &mut self.ref_counts;
        free.allocate(from_free, after, |run| {
            ref_counts[run.clone()].fill(1);
            add_run(run);
        });
        self.units_in_use += from_free * *units;
        if from_free < n { self.allocate_by_evicting(0, n - from_free, &mut add_run) } else { 0 }
    }

    /// Does the same in a pool with several groups, which share their memory.
    #[inline(never)]
    fn allocate_shared(
        &mut self,
        group: usize,
        n: usize,
        after: Option<BlockId>,
        add_run: &mut dyn FnMut(Range<usize>),
    ) -> usize {
        let room = self.room() / self.groups[group].units;
        let from_free = self.allocate_free(group, n.min(room), after, add_run);
        self.allocate_by_evicting(group, n - from_free, add_run)
    }

    /// Allocates up to `n` blocks that are free, in a pool with several groups, and returns how many.
    fn allocate_free(
        &mut self,
        group: usize,
        n: usize,
        after: Option<BlockId>,
        add_run: &mut dyn FnMut(Range<usize>),
    ) -> usize {
        let Group { first, free, units, resident, .. } = &mut self.groups[group];
        let n = n.min(free.len());
        let ref_counts = &mut self.ref_counts;
        free.allocate(n, after, |run| {
            ref_counts[*first + run.start..*first + run.end].fill(1);
            if let Some(resident) = resident {
                resident.insert(run.clone());
            }
            add_run(run);
        });
        self.units_in_use += n * *units;
        n
    }

    /// Allocates `n` blocks by evicting. Returns `n`, since the caller has counted what is evictable.
    #[inline]
    fn allocate_by_evicting(&mut self, group: usize, n: usize, mut add_run: impl FnMut(Range<usize>)) -> usize {
        let mut evicted = 0;
        // In a pool with one group, every victim is of that group.
        while evicted < n && self.groups.len() == 1 && self.leftovers.evicted.is_empty() {
            let Some(victim) = self.evictable.next_victim() else { break };
            self.evictable.remove(victim);
            let units = self.groups.first.units;
            self.units_evictable -= units;
            self.units_in_use += units;
            self.ref_counts[victim] = 1;
            self.uncache(0, victim);
            add_run(victim..victim + 1);
            evicted += 1;
        }
        self.stats.evictions += evicted as u64;
        while evicted < n {
            let Some(id) = self.reclaim(group) else { break };
            add_run(id.index()..id.index() + 1);
            evicted += 1;
        }
        debug_assert_eq!(evicted, n, "as many blocks are available as were counted");
        evicted
    }

    /// How many units can be allocated without evicting any block: the free ones, and those of leftovers, which count as
    /// in use only until the caller has dealt with them. (With them the budget can be passed.)
    fn room(&self) -> usize {
        let Leftovers { evicted, unneeded, .. } = &self.leftovers;
        let leftovers: usize = evicted.iter().chain(unneeded).map(|&(group, _)| self.groups[group].units).sum();
        (self.budget + leftovers).saturating_sub(self.units_in_use + self.units_evictable)
    }

    /// Allocates one block of a group by evicting: a block of this group, or as many of other groups as take its units.
    #[inline]
    fn reclaim(&mut self, group: usize) -> Option<BlockId> {
        loop {
            let units = self.groups[group].units;
            // Blocks that lost their prefix together with an evicted one were counted as available, too.
            if !self.leftovers.evicted.is_empty()
                && self.room() >= units
                && let Some(at) = self.leftovers.evicted.iter().position(|&(of, _)| of == group)
            {
                return Some(self.leftovers.evicted.swap_remove(at).1);
            }
            if self.groups.len() > 1 && self.room() >= units {
                // The group has a free block: blocks of all its memory would take more than the budget.
                let mut id = None;
                self.allocate_free(group, 1, None, &mut |run| id = Some(BlockId::new(run.start)));
                return id;
            }
            let victim = self.evictable.next_victim()?;
            let (of, id) = self.evict(victim);
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
        let several = self.groups.len() > 1;
        let of = &mut self.groups[group];
        if several {
            of.evictable -= 1;
        }
        self.units_evictable -= of.units;
        self.units_in_use += of.units;
    }

    /// Evicts the evictable blocks of the same group that no match reaches without this block, from the last to the first.
    #[cold]
    pub(super) fn evict_followers(&mut self, group: usize, entry: Entry) {
        let (mut found, mut next) = (vec![entry], 0);
        while let Some(&before) = found.get(next) {
            let followers = self.tree.followers(group, before).into_iter().map(|id| self.entry(group, id));
            found.extend(followers.filter(|&follower| self.ref_counts[follower] == 0));
            next += 1;
        }
        for &follower in found[1..].iter().rev() {
            // Unless it has been dropped meanwhile together with a cold prefix.
            if self.ref_counts[follower] == 0 {
                let follower = self.evict(follower);
                self.leftovers.evicted.push(follower);
            }
        }
    }

    /// Evicts an evictable block, whose ref_count is 1 from now on. Returns its group and its id.
    #[inline]
    fn evict(&mut self, entry: Entry) -> (usize, BlockId) {
        let (group, id) = self.block(entry);
        self.use_evictable(group, entry);
        self.ref_counts[entry] = 1;
        self.uncache(group, entry);
        self.stats.evictions += 1;
        (group, id)
    }

    /// Takes the block out of the tree. If there are too many tombstones then, the coldest prefixes are dropped.
    #[inline]
    pub(super) fn uncache(&mut self, group: usize, entry: Entry) {
        if self.offload.is_some()
            && let Some(lineage) = self.tree.lineage(entry).cloned()
        {
            self.offload_evicted(group, BlockId::new(entry - self.groups[group].first), lineage);
        }
        if self.tree.remove_block(group, entry) {
            let block = BlockId::new(entry - self.groups[group].first);
            self.subscribers.publish(|| KvEvent::BlockRemoved { group, block });
        }
        if self.tree.has_too_many_tombstones() {
            self.drop_cold_prefixes();
        }
    }

    #[cold]
    pub(super) fn drop_cold_prefixes(&mut self) {
        while self.tree.has_too_many_tombstones() {
            let lineage = self.tree.lineage_of_coldest().cloned();
            let Some(dropped) = self.tree.drop_coldest() else { return };
            for (group, block) in dropped {
                self.subscribers.publish(|| KvEvent::BlockRemoved { group, block });
                let entry = self.entry(group, block);
                if self.ref_counts[entry] == 0 {
                    self.use_evictable(group, entry);
                    self.ref_counts[entry] = 1;
                    self.leftovers.evicted.push((group, block));
                    if let Some(lineage) = &lineage {
                        self.offload_evicted(group, block, lineage.clone());
                    }
                }
            }
        }
    }

    /// Notes that the content of a block goes to a tier, if none has it.
    #[cold]
    fn offload_evicted(&mut self, group: usize, id: BlockId, lineage: Arc<Lineage>) {
        if !lineage.is_stored(group) {
            self.leftovers.offloaded.push(Evictee { group, id, lineage });
            self.leftovers.queue.clone_from(&self.offload);
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
