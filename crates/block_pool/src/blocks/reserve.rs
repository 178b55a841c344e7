//! Allocating blocks, and making one writable.

use std::ops::Range;

use smallvec::SmallVec;

use super::Blocks;
use crate::ledger::{Leftovers, Reservation, Why};
use crate::list::{Ids, List};
use crate::{BlockId, BlockPool, OutOfBlocks, ReserveError, Window};

impl Blocks {
    /// Allocates blocks that replace those of lists which got their first block in `epoch`: lists of these lengths, with
    /// these numbers of freed blocks.
    pub(crate) fn successors(
        pool: &BlockPool,
        window: Option<Window>,
        epoch: u64,
        lists: &[(usize, usize)],
    ) -> Result<Self, OutOfBlocks> {
        let mut blocks = Self::empty(pool).with_window(window);
        let mut new: SmallVec<[List; 4]> =
            lists.iter().map(|&(n, freed)| List { ids: Ids::with_capacity(n), freed }).collect();
        let mut ledger = pool.ledger();
        let reserved = ledger.reserve(&mut new, |_, _| None, |group| lists[group].0)?;
        let leftovers = ledger.has_leftovers().then(|| ledger.take_leftovers());
        drop(ledger);
        for (group, list) in new.into_iter().enumerate() {
            *blocks.list_mut(group) = list;
        }
        blocks.epoch = epoch;
        blocks.after_reserve(&reserved, leftovers);
        Ok(blocks)
    }

    /// Adds `n` blocks at the end of each list, adjacent to the last one where possible.
    ///
    /// # Errors
    ///
    /// [`OutOfBlocks`] when the pool has no room for all of them; then none is added.
    #[inline]
    pub fn grow(&mut self, n: usize) -> Result<(), OutOfBlocks> {
        if n == 0 {
            return Ok(());
        }
        if self.others().is_empty() {
            return self.grow_first(n);
        }
        self.reserve_blocks(None, n).map(drop)
    }

    /// Adds `n` blocks at the end of the only list.
    #[inline]
    fn grow_first(&mut self, n: usize) -> Result<(), OutOfBlocks> {
        if n > self.pool.most_blocks() {
            return Err(self.refused(n));
        }
        let Self { pool, first: List { ids, .. }, epoch, .. } = self;
        ids.reserve(n);
        let last = ids.last().copied();
        let mut ledger = pool.ledger();
        if ids.is_empty() {
            *epoch = ledger.epoch();
        }
        let evicted = ledger.allocate_checked(n, last, |run| add(ids, run))?;
        // Only an eviction leaves something to be dealt with.
        if evicted > 0 {
            let leftovers = ledger.take_leftovers();
            drop(ledger);
            self.clean_up(&[Reservation { copied: None, evicted }], leftovers);
        }
        Ok(())
    }

    /// The refusal of a request for more blocks in each list than the pool can have. Memory for their ids was not
    /// requested.
    #[cold]
    fn refused(&self, n: usize) -> OutOfBlocks {
        let units = self.pool.units_per_block();
        OutOfBlocks { requested: n.saturating_mul(units), available: self.pool.available() }
    }

    /// Makes block number `at` writable in every group and adds `n` blocks at the end of each list. Copies are put
    /// before those, and have yet to get their content.
    fn reserve_blocks(&mut self, at: Option<usize>, n: usize) -> Result<SmallVec<[Reservation; 1]>, OutOfBlocks> {
        if n > self.pool.most_blocks() {
            return Err(self.refused(n));
        }
        let mut sinks = SmallVec::<[usize; 4]>::new();
        let mut lists: SmallVec<[List; 4]> = SmallVec::new();
        for group in self.groups() {
            sinks.push(self.sink_blocks(group));
            let list = self.list_mut(group);
            list.ids.reserve(n.saturating_add(1));
            lists.push(std::mem::take(list));
        }
        let mut ledger = self.pool.ledger();
        if lists.iter().all(|list| list.ids.is_empty()) {
            self.epoch = ledger.epoch();
        }
        let index = |group: usize, list: &List| list.index_of(at?, sinks[group]);
        let reserved = ledger.reserve(&mut lists, index, |_| n);
        let leftovers = ledger.has_leftovers().then(|| ledger.take_leftovers());
        drop(ledger);
        for (group, list) in lists.into_iter().enumerate() {
            *self.list_mut(group) = list;
        }
        let reserved = reserved?;
        self.after_reserve(&reserved, leftovers);
        Ok(reserved)
    }

    #[inline]
    fn after_reserve(&self, reserved: &[Reservation], leftovers: Option<Leftovers>) {
        if leftovers.is_some() || reserved.iter().any(|of| of.evicted > 0) {
            self.clean_up(reserved, leftovers.unwrap_or_default());
        }
    }

    /// Finishes an allocation that has evicted blocks or taken memory of other groups: the former still have their old
    /// content.
    #[cold]
    fn clean_up(&self, reserved: &[Reservation], leftovers: Leftovers) {
        // Dropped at the end, even if the storage panics: this frees the blocks.
        let leftovers = self.pool.own(leftovers);
        for (group, of) in reserved.iter().enumerate() {
            let ids = self.group(group);
            self.pool.poison(group, &ids[ids.len() - of.evicted..]);
        }
        drop(leftovers);
        // Last, because this calls the host's code, which may panic.
        let evicted: usize = reserved.iter().map(|of| of.evicted).sum();
        tracing::trace!(evicted, "cached blocks were evicted");
    }

    /// Makes block number `at` writable in every group and adds `n` blocks at the end of each list, in one transaction.
    ///
    /// If the block is cached or other sequences use it, too, this one gets a copy of it, and the original stays
    /// unchanged (copy-on-write). There is one exception: if only this sequence uses the original and there is no room
    /// for the copy, the original is uncached and written in place. If there is no block `at`, nothing is copied.
    ///
    /// # Errors
    ///
    /// [`ReserveError::OutOfBlocks`] when the pool has no room for both the copies and the growth;
    /// [`ReserveError::Storage`] when a copy fails. In both cases the blocks are unchanged.
    #[inline]
    pub fn copy_on_write(&mut self, at: usize, n: usize) -> Result<(), ReserveError> {
        match self.writable(at) {
            None => return Ok(self.grow(n)?),
            Some(true) if n == 0 => return Ok(()),
            Some(_) => {}
        }
        let before: SmallVec<[usize; 4]> = self.groups().map(|group| self.group(group).len()).collect();
        let reserved = self.reserve_blocks(Some(at), n)?;
        if reserved.iter().all(|of| of.copied.is_none()) {
            return Ok(());
        }
        // Until they have their content, the copies stay at the end of the lists. Meanwhile this sequence still uses the
        // originals, so that they cannot be allocated by another. Dropped early, by an error or a panic of the storage,
        // this frees what was added.
        let mut undo = Undo { blocks: self, before: before.clone(), is_armed: true };
        for (group, of) in reserved.iter().enumerate() {
            if let Some(original) = of.copied {
                let blocks = &*undo.blocks;
                blocks.pool.storage(group).copy(original, blocks.group(group)[before[group]])?;
            }
        }
        undo.is_armed = false;
        drop(undo);
        for (group, of) in reserved.iter().enumerate() {
            let Some(original) = of.copied else { continue };
            let (before, sinks) = (before[group], self.sink_blocks(group));
            let list = self.list_mut(group);
            let Some(index) = list.index_of(at, sinks) else { continue };
            list.ids[index] = list.ids[before];
            list.ids.remove(before);
            let mut ledger = self.pool.ledger();
            ledger.count_copy();
            if index + 1 < before {
                ledger.mark_passed(group, &[original]);
            }
            drop(ledger);
            self.pool.free(group, &[original], Why::Ended);
        }
        Ok(())
    }

    /// Whether block number `at` can be written as it is, in every group that has it; `None` if no group has it.
    #[inline]
    fn writable(&self, at: usize) -> Option<bool> {
        if self.others().is_empty() {
            let id = self.block(0, at)?;
            return Some(self.pool.ledger().is_writable(0, id));
        }
        let of = |group| Some((group, self.block(group, at)?));
        let mut blocks = self.groups().filter_map(of).peekable();
        blocks.peek()?;
        let ledger = self.pool.ledger();
        Some(blocks.all(|(group, id)| ledger.is_writable(group, id)))
    }

    /// How many available units [`copy_on_write`](Self::copy_on_write) with the same arguments needs.
    pub fn copy_on_write_cost(&self, at: usize, n: usize) -> usize {
        self.pool.ledger().reserve_cost(self.groups().map(|group| self.block(group, at)), n)
    }
}

/// Frees what was added to lists of these lengths, unless it is disarmed.
struct Undo<'b> {
    blocks: &'b mut Blocks,
    before: SmallVec<[usize; 4]>,
    is_armed: bool,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if self.is_armed {
            for (group, before) in self.before.iter().enumerate() {
                self.blocks.truncate_group(group, *before);
            }
        }
    }
}

/// Adds a run of adjacent blocks.
#[inline]
fn add(ids: &mut Ids, run: Range<usize>) {
    if run.len() == 1 {
        ids.push(BlockId::new(run.start));
    } else {
        ids.extend(run.map(BlockId::new));
    }
}
