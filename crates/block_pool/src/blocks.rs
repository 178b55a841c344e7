//! A sequence's blocks: the unit of ownership.

use std::fmt;
use std::ops::{Deref, Range};

use smallvec::SmallVec;

use crate::ledger::{Content, Leftovers, Query, Reservation, Why};
use crate::list::{Ids, List};
use crate::{
    AlreadyCached, BlockId, BlockPool, GroupBlock, OutOfBlocks, OutOfWindow, PrefixKey, PrefixMatch, ReserveError,
    Salt, SaltFrom, Span, Window,
};

/// The blocks of one sequence that are in use: an ordered list in each group of the pool. Dropping it frees them all,
/// and takes the pool's lock once for each group.
///
/// The whole of a sequence's blocks, not a single block, is the unit of ownership: a double free or a use after free
/// cannot be written in safe code, and blocks leak only if they are never dropped (`std::mem::forget`). Several
/// sequences can use the same block (see [`fork`](Self::fork)); it is freed when the last of them is dropped.
///
/// Blocks are numbered in the order of the sequence's tokens, and all groups have the same numbers: block `n` holds the
/// tokens from `n * block_size` on. In a group with a window, those that the window has passed are freed, and the list
/// does not have them any more. A `Blocks` is also the list of its first group, as a slice.
#[must_use = "dropping them frees the blocks"]
pub struct Blocks {
    pool: BlockPool,
    first: List,
    /// What most sequences do not have.
    more: Option<Box<More>>,
    /// The pool's epoch when the lists got their first block: see [`BlockPool::reset_prefix_cache`].
    epoch: u64,
}

/// What a sequence has in a pool with several groups or with a window, or with a window of its own, or with salts from
/// a position on.
#[derive(Default)]
struct More {
    /// The lists of all groups but the first.
    others: Vec<List>,
    /// A window of the sequence itself, which narrows the span of every group.
    window: Option<Window>,
    /// In the order of their positions.
    salts: Vec<SaltFrom>,
}

/// Among how many of its last blocks the last full one of a sequence is searched for.
const LAST_BLOCKS: usize = 8;

/// Indices of groups.
type Groups = SmallVec<[usize; 4]>;

impl Blocks {
    /// Makes empty lists, to which [`grow`](Self::grow) can add blocks of `pool`.
    #[inline]
    pub fn empty(pool: &BlockPool) -> Self {
        let more = (!pool.is_simple()).then(|| {
            let others = (1..pool.groups().len()).map(|_| List::default()).collect();
            Box::new(More { others, ..More::default() })
        });
        Self { pool: pool.clone(), first: List::default(), more, epoch: 0 }
    }

    /// The same, for a sequence with a window of its own, which narrows the span of every group.
    pub fn with_window(mut self, window: Option<Window>) -> Self {
        if window.is_some() || self.more.is_some() {
            self.more.get_or_insert_default().window = window;
        }
        self
    }

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

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The pool that the blocks belong to.
    #[inline]
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// The window of the sequence itself.
    #[inline]
    pub fn window(&self) -> Option<Window> {
        self.more.as_ref().and_then(|more| more.window)
    }

    /// The lists of all groups but the first.
    #[inline]
    fn others(&self) -> &[List] {
        self.more.as_ref().map_or(&[], |more| &more.others)
    }

    /// Whether the pool has one group, whose tokens see all tokens before them, and the sequence has no window.
    #[inline]
    fn is_simple(&self) -> bool {
        // Salts change nothing of what is seen.
        let is_simple = |more: &More| more.others.is_empty() && more.window.is_none() && self.pool.is_simple();
        self.more.as_deref().is_none_or(is_simple)
    }

    /// The salts of the sequence that hold from a position on, in the order of their positions.
    #[inline]
    pub fn salts(&self) -> &[SaltFrom] {
        self.more.as_ref().map_or(&[], |more| &more.salts)
    }

    /// From `position` on the sequence depends on `salt`, in addition to its tokens and key: the block that contains
    /// the position, and all after it, are cached under the salt and match only sequences with the same salts from the same
    /// positions on. In a block in which a salt begins, even the tokens before it match only those. Salts are compared
    /// byte for byte. ([`Salt::none`] changes nothing. vLLM: extra keys.)
    ///
    /// None of the tokens from `position` on may be cached or matched yet: the caller, who knows how many tokens there
    /// are, sees to that. A salt that the sequence has from this position on already is not added again.
    pub fn salt_from(&mut self, position: usize, salt: Salt) {
        if salt.bytes().is_some() {
            let salts = &mut self.more.get_or_insert_default().salts;
            let (at, salt) = (salts.partition_point(|other| other.position <= position), SaltFrom { position, salt });
            if !salts.contains(&salt) {
                salts.insert(at, salt);
            }
        }
    }

    /// Removes the salts that begin at `position` or later. None of the tokens from there on may be cached or matched.
    pub fn remove_salts_from(&mut self, position: usize) {
        if let Some(more) = &mut self.more {
            more.salts.retain(|salt| salt.position < position);
        }
    }

    pub(crate) fn with_salts(mut self, salts: &[SaltFrom]) -> Self {
        if !salts.is_empty() {
            self.more.get_or_insert_default().salts = salts.to_vec();
        }
        self
    }

    /// Which tokens a token of the sequence sees in a group.
    ///
    /// # Panics
    ///
    /// If the pool has no such group.
    #[inline]
    pub fn span(&self, group: usize) -> Span {
        self.pool.groups()[group].span.narrowed_by(self.window())
    }

    /// The blocks of a group, in order, without the freed ones; empty if the pool has no such group.
    #[inline]
    pub fn group(&self, group: usize) -> &[BlockId] {
        self.list(group).map_or(&[], |list| &list.ids)
    }

    /// How many blocks the sequence has, freed ones included: the number of the next block.
    #[inline]
    pub fn end(&self) -> usize {
        self.first.end()
    }

    /// The numbers of the blocks that were freed in a group. The blocks before the range come first in
    /// [`group`](Self::group), those after it follow. If none was freed, the range is empty and at the end of the list.
    pub fn freed(&self, group: usize) -> Range<usize> {
        let Some(list) = self.list(group) else { return 0..0 };
        let start = if list.freed > 0 { self.sink_blocks(group) } else { list.ids.len() };
        start..start + list.freed
    }

    /// The block of a group with this number, unless it was freed.
    #[inline]
    pub fn block(&self, group: usize, number: usize) -> Option<BlockId> {
        let list = self.list(group)?;
        if list.freed == 0 {
            return list.ids.get(number).copied();
        }
        list.block(number, self.sink_blocks(group))
    }

    #[inline]
    fn list(&self, group: usize) -> Option<&List> {
        match group {
            0 => Some(&self.first),
            group => self.others().get(group - 1),
        }
    }

    #[inline]
    fn list_mut(&mut self, group: usize) -> &mut List {
        self.pool_and_list(group).1
    }

    /// The pool, and the list of a group, which exists.
    #[inline]
    fn pool_and_list(&mut self, group: usize) -> (&BlockPool, &mut List) {
        let Self { pool, first, more, .. } = self;
        match (group, more) {
            (1.., Some(more)) => (pool, &mut more.others[group - 1]),
            _ => (pool, first),
        }
    }

    #[inline]
    fn groups(&self) -> Range<usize> {
        0..1 + self.others().len()
    }

    fn sink_blocks(&self, group: usize) -> usize {
        self.span(group).sink_blocks(self.pool.block_size())
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
            return self.grow_group(0, n);
        }
        self.reserve_blocks(None, n).map(drop)
    }

    /// Adds `n` blocks at the end of one list.
    #[inline]
    fn grow_group(&mut self, group: usize, n: usize) -> Result<(), OutOfBlocks> {
        if n == 0 {
            return Ok(());
        }
        if n > self.pool.units() {
            return Err(self.refused(n));
        }
        let several = !self.others().is_empty();
        let Self { pool, first, more, epoch } = self;
        let ids = match (group, more) {
            (1.., Some(more)) => &mut more.others[group - 1].ids,
            _ => &mut first.ids,
        };
        ids.reserve(n);
        let last = ids.last().copied();
        let mut ledger = pool.ledger();
        if ids.is_empty() {
            *epoch = ledger.epoch();
        }
        let evicted = ledger.allocate_checked(group, n, last, |run| add(ids, run))?;
        // In a pool with one group only an eviction leaves something to be dealt with.
        if evicted > 0 || (several && ledger.has_leftovers()) {
            let leftovers = ledger.take_leftovers();
            drop(ledger);
            self.clean_up(&[Reservation { copied: None, evicted }], group, leftovers);
        }
        Ok(())
    }

    /// The refusal of a request for more blocks in each list than the pool has units. Memory for their ids was not
    /// requested.
    #[cold]
    fn refused(&self, n: usize) -> OutOfBlocks {
        let units = self.pool.units_per_block();
        OutOfBlocks { requested: n.saturating_mul(units), available: self.pool.available() }
    }

    /// Makes block number `at` writable in every group and adds `n` blocks at the end of each list. Copies are put
    /// before those, and have yet to get their content.
    fn reserve_blocks(&mut self, at: Option<usize>, n: usize) -> Result<SmallVec<[Reservation; 1]>, OutOfBlocks> {
        if n > self.pool.units() {
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
            self.clean_up(reserved, 0, leftovers.unwrap_or_default());
        }
    }

    /// Finishes an allocation that has evicted blocks or taken memory of other groups: the former still have their old
    /// content. `reserved` are the allocations of the groups from number `first` on.
    #[cold]
    fn clean_up(&self, reserved: &[Reservation], first: usize, leftovers: Leftovers) {
        // Dropped at the end, even if the storage panics: this frees the blocks.
        let leftovers = self.pool.own(leftovers);
        for (group, of) in (first..).zip(reserved) {
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
        // originals, so that they cannot be allocated by another.
        for (group, of) in reserved.iter().enumerate() {
            let Some(original) = of.copied else { continue };
            if let Err(error) = self.pool.storage(group).copy(original, self.group(group)[before[group]]) {
                for (group, before) in before.into_iter().enumerate() {
                    self.truncate_group(group, before);
                }
                return Err(error.into());
            }
        }
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

    /// Keeps the blocks before number `end` and frees the others. Does nothing if there are none.
    #[inline]
    pub fn truncate(&mut self, end: usize) {
        for group in self.groups() {
            let freed = self.list(group).map_or(0, |list| list.freed);
            self.truncate_group(group, end.saturating_sub(freed));
        }
    }

    /// Keeps the first `len` blocks of a list.
    #[inline]
    fn truncate_group(&mut self, group: usize, len: usize) {
        let (pool, list) = self.pool_and_list(group);
        if len < list.ids.len() {
            pool.free(group, &list.ids[len..], Why::Ended);
            list.ids.truncate(len);
        }
    }

    /// Keeps what a sequence of the first `len` tokens has.
    ///
    /// # Errors
    ///
    /// [`OutOfWindow`] when a window has freed a block that the next token would see; then nothing changes.
    pub fn go_back(&mut self, len: usize) -> Result<(), OutOfWindow> {
        let freed = self.freed_at(len)?;
        for (group, freed) in freed.into_iter().enumerate() {
            let sinks = self.sink_blocks(group);
            if freed < self.list_mut(group).freed {
                self.truncate_group(group, sinks);
                self.list_mut(group).freed = freed;
            }
        }
        self.truncate(self.pool.blocks_for(len));
        Ok(())
    }

    /// For each group, how many of the first blocks of a sequence of the first `len` tokens are freed: as many as now, or
    /// none if it ends before the freed ones.
    fn freed_at(&self, len: usize) -> Result<SmallVec<[usize; 4]>, OutOfWindow> {
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
    fn free_after(&mut self, group: usize, sinks: usize, passed: usize, why: Why) {
        let (pool, list) = self.pool_and_list(group);
        if passed <= list.freed {
            return;
        }
        let range = sinks.min(list.ids.len())..(sinks + passed - list.freed).min(list.ids.len());
        if !range.is_empty() {
            let ids = &list.ids[range.clone()];
            pool.ledger().mark_passed(group, ids);
            pool.free(group, ids, why);
            list.ids.drain(range);
        }
        list.freed = passed;
    }

    /// The number of the last block that is cached, out of the last few, and that block in any group that has it.
    fn last_cached(&self) -> Option<(usize, GroupBlock)> {
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
    fn keep_for_full_blocks(&self, group: usize, (number, last): (usize, GroupBlock)) {
        let (span, block_size) = (self.span(group), self.pool.block_size());
        let Some(list) = self.list(group).filter(|list| list.freed > 0) else { return };
        let (full, sinks) = (number + 1, span.sink_blocks(block_size));
        let passed = (sinks + list.freed).min(full);
        let kept = (sinks + span.freed_blocks(full * block_size, block_size)).min(passed.saturating_sub(1));
        self.pool.ledger().keep(group, last, full - passed..full - kept);
    }

    /// Makes other lists that use these blocks before number `end` too.
    pub fn fork(&self, end: usize) -> Blocks {
        let freed: SmallVec<[usize; 4]> = self.groups().map(|group| self.list(group).map_or(0, |l| l.freed)).collect();
        self.fork_with(end, &freed)
    }

    /// Makes other lists that use what a sequence of the first `len` tokens has.
    ///
    /// # Errors
    ///
    /// As [`go_back`](Self::go_back).
    pub fn fork_at(&self, len: usize) -> Result<Blocks, OutOfWindow> {
        Ok(self.fork_with(self.pool.blocks_for(len), &self.freed_at(len)?))
    }

    fn fork_with(&self, end: usize, freed: &[usize]) -> Blocks {
        let mut fork = Self::empty(&self.pool).with_window(self.window()).with_salts(self.salts());
        fork.epoch = self.epoch;
        let mut ledger = self.pool.ledger();
        for (group, &freed) in freed.iter().enumerate() {
            let ids = self.group(group);
            let ids = Ids::from_slice(&ids[..end.saturating_sub(freed).min(ids.len())]);
            ledger.add_refs(group, &ids);
            *fork.list_mut(group) = List { ids, freed };
        }
        drop(ledger);
        fork
    }

    /// Adds the cached blocks that continue these with `tokens`, and returns how many of the tokens they cover. `at` is
    /// the number of the first block to match: [`end`](Self::end).
    ///
    /// Nothing matches unless `at` is 0, or the block before is cached under the same key. In a group with a window, only
    /// those blocks are added that a sequence of the new length uses: the blocks of the sink tokens, and those that its
    /// next token sees. The last block added may match only in its first few tokens: it must be made writable with
    /// [`copy_on_write`](Self::copy_on_write) before the sequence continues in it.
    pub fn match_prefix(&mut self, key: &PrefixKey, at: usize, tokens: &[u32]) -> usize {
        if tokens.is_empty() {
            return 0;
        }
        let last = self.last(at);
        let room = self.pool.blocks_for(tokens.len()).min(self.pool.units());
        let Self { pool, first, more, epoch } = self;
        first.ids.reserve(room);
        let mut ledger = pool.ledger();
        if at == 0 {
            *epoch = ledger.epoch();
        }
        let query = |salts| Query { key, at, last, salts, tokens };
        let matched = match more.as_deref_mut() {
            None => ledger.match_prefix(query(&[]), |_, id| first.ids.push(id)),
            Some(More { others, salts, .. }) => ledger.match_prefix(query(salts), |group, id| match group {
                0 => first.ids.push(id),
                group => others[group - 1].ids.push(id),
            }),
        };
        drop(ledger);
        if matched > 0 && !self.is_simple() {
            self.pass_matched(at, at * self.pool.block_size() + matched);
        }
        matched
    }

    /// After a match from block `at` on, up to `len` tokens: frees the blocks that the sequence had before and that
    /// windows have passed now. The match has added no such blocks.
    fn pass_matched(&mut self, at: usize, len: usize) {
        let block_size = self.pool.block_size();
        for group in self.groups() {
            let span = self.span(group);
            if span.is_all() {
                continue;
            }
            let (sinks, passed) = (span.sink_blocks(block_size), span.freed_blocks(len, block_size));
            let had = at.saturating_sub(sinks).min(passed);
            self.free_after(group, sinks, had, Why::Passed);
            let list = self.list_mut(group);
            list.freed = list.freed.max(passed);
        }
    }

    /// Block number `at - 1` in any group that has it.
    fn last(&self, at: usize) -> Option<GroupBlock> {
        let number = at.checked_sub(1)?;
        self.groups().find_map(|group| Some(GroupBlock { group, block: self.block(group, number)? }))
    }

    /// Looks up what [`match_prefix`](Self::match_prefix) would match at this moment, and how many available units it
    /// would take to use that match and then to have slots for `slots` tokens from block number `at` on. With `chunk`,
    /// the sequence gets slots for at most this many tokens at a time, and windows free blocks in between. No block is
    /// used, and the statistics do not change.
    pub fn lookup_prefix(
        &self,
        key: &PrefixKey,
        at: usize,
        tokens: &[u32],
        slots: usize,
        chunk: Option<usize>,
    ) -> PrefixMatch {
        let query = Query { key, at, last: self.last(at), salts: self.salts(), tokens };
        self.pool.ledger().lookup_prefix(query, slots, chunk, |group| self.group(group))
    }

    /// How many available units [`copy_on_write`](Self::copy_on_write) with the same arguments needs.
    pub fn copy_on_write_cost(&self, at: usize, n: usize) -> usize {
        self.pool.ledger().reserve_cost(self.groups().map(|group| self.block(group, at)), n)
    }

    /// Caches the full blocks from number `at` on under their tokens, which are `head` followed by `tokens`. Returns how
    /// many blocks were exchanged for blocks with the same content that were cached before.
    ///
    /// Nothing is cached from lists that got their first block before the last
    /// [`reset_prefix_cache`](BlockPool::reset_prefix_cache).
    ///
    /// Other sequences read what is cached from now on: every slot of these blocks must have been written. Nothing is
    /// cached after a block that is not cached, or that is cached under another key.
    ///
    /// # Errors
    ///
    /// [`AlreadyCached`] if block `at` is cached: it has the content of another computation, not of these tokens, and
    /// nothing can be cached after it here.
    pub fn cache(&mut self, key: &PrefixKey, at: usize, head: &[u32], tokens: &[u32]) -> Result<usize, AlreadyCached> {
        if head.len() >= self.pool.block_size() || at >= self.end() {
            return Ok(0);
        }
        let Self { pool, first, more, epoch } = self;
        let (others, salts) = match more.as_deref_mut() {
            Some(More { others, salts, .. }) => (&mut others[..], &salts[..]),
            None => (&mut [][..], &[][..]),
        };
        let content = Content { key, salts, at, head, tokens };
        let duplicates = if others.is_empty() {
            pool.ledger().cache(*epoch, std::slice::from_mut(first), content)?
        } else {
            let mut lists: SmallVec<[List; 4]> = SmallVec::new();
            lists.push(std::mem::take(first));
            lists.extend(others.iter_mut().map(std::mem::take));
            let duplicates = pool.ledger().cache(*epoch, &mut lists, content);
            let mut lists = lists.into_iter();
            *first = lists.next().unwrap_or_default();
            others.iter_mut().zip(lists).for_each(|(other, list)| *other = list);
            duplicates?
        };
        for &(group, id) in &duplicates {
            pool.free(group, &[id], Why::Ended);
        }
        Ok(duplicates.len())
    }

    /// Copies the first `tokens.len()` tokens of block number `at` into `tokens`. Returns whether the block is cached:
    /// only then are its tokens known.
    pub fn cached_tokens(&self, at: usize, tokens: &mut [u32]) -> bool {
        let ledger = self.pool.ledger();
        let of = |group| ledger.tokens(group, self.block(group, at)?);
        let known = self.groups().find_map(of).and_then(|known| known.get(..tokens.len()));
        if let Some(known) = known {
            tokens.copy_from_slice(known);
        }
        known.is_some()
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

impl Deref for Blocks {
    type Target = [BlockId];

    #[inline]
    fn deref(&self) -> &[BlockId] {
        &self.first.ids
    }
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.others().is_empty() {
            return f.debug_list().entries(self.iter()).finish();
        }
        f.debug_list().entries(self.groups().map(|group| self.group(group))).finish()
    }
}

impl Drop for Blocks {
    /// Blocks with windows are freed last, and so evicted last: without the last window of an idle prefix, all of the
    /// prefix is useless.
    #[inline]
    fn drop(&mut self) {
        if self.others().is_empty() {
            if !self.is_simple()
                && let Some(last) = self.last_cached()
            {
                self.keep_for_full_blocks(0, last);
            }
            return self.pool.free(0, &self.first.ids, Why::Ended);
        }
        let last = self.last_cached();
        for windowed in [false, true] {
            for group in self.groups().filter(|&group| self.span(group).is_all() != windowed).collect::<Groups>() {
                if let (true, Some(last)) = (windowed, last) {
                    self.keep_for_full_blocks(group, last);
                }
                self.truncate_group(group, 0);
            }
        }
    }
}
