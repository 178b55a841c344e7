//! A sequence's blocks: the unit of ownership.
//!
//! - this file: what a sequence has, and forks;
//! - `reserve`: allocating blocks, and making one writable;
//! - `shrink`: freeing blocks;
//! - `prefix`: matching and caching;
//! - `content`: their bytes, and what is cached of them.

mod content;
mod prefix;
mod reserve;
mod shrink;

pub use content::CachedPrefix;

use std::fmt;
use std::ops::{Deref, Range};

use smallvec::SmallVec;

use crate::ledger::Why;
use crate::list::{Ids, List};
use crate::{BlockId, BlockPool, OutOfWindow, SaltFrom, Span, Window};

/// The blocks of one sequence that are in use: an ordered list in each group of the pool. Dropping it frees them all.
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

    /// The same lists, which must be empty, for a sequence with a window of its own. It narrows the span of every group.
    pub fn with_window(mut self, window: Option<Window>) -> Self {
        if window.is_some() || self.more.is_some() {
            self.more.get_or_insert_default().window = window;
        }
        self
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

    /// Makes other lists that use these blocks before number `end` too, and all blocks before those that a window has
    /// freed: [`fork_at`](Self::fork_at) forks from there.
    pub fn fork(&self, end: usize) -> Blocks {
        let end = self.after_freed(end);
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

/// Does its work when it is dropped.
struct Finally<F: FnMut()>(F);

impl<F: FnMut()> Drop for Finally<F> {
    fn drop(&mut self) {
        (self.0)();
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
        let this = &*self;
        let lists = move |windowed: bool| {
            let groups = this.groups().filter(move |&group| this.span(group).is_all() != windowed);
            groups.map(move |group| (group, this.group(group)))
        };
        // If the storage panics, the blocks with windows are freed nevertheless.
        let _windowed = Finally(|| {
            if let Some(last) = last {
                lists(true).for_each(|(group, _)| this.keep_for_full_blocks(group, last));
            }
            this.pool.free_lists(lists(true), Why::Ended);
        });
        this.pool.free_lists(lists(false), Why::Ended);
    }
}
