//! The pool's bookkeeping under one lock: for each group of layers the free blocks, the ref_count of each block, and
//! the cached blocks.
//!
//! They share a lock so that "its ref_count is 0" and "it is free" become true at the same instant: no thread ever sees
//! a block that is neither in use, nor evictable, nor free.
//!
//! | | ref_count | cached in the tree | counts against the budget |
//! |---|---|---|---|
//! | free | 0 | no | no |
//! | evictable | 0 | yes | yes |
//! | in use | 1 or more | maybe | yes |
//!
//! - this file: the groups, and the budget that they share;
//! - `allocate`: allocating and evicting;
//! - `counts`: forking and freeing;
//! - `write`: making a block writable;
//! - `cache`: matching prefixes, and caching blocks;
//! - `need`: how many units a sequence takes to go on;
//! - `resident`: which blocks have memory, when groups share it;
//! - `offload`: which blocks go to a tier;
//! - `check`: whether all of it is consistent.

mod allocate;
mod cache;
mod check;
mod counts;
mod need;
mod offload;
mod resident;
mod write;

use std::ops::{Index, IndexMut};
use std::sync::Arc;

use smallvec::SmallVec;

use crate::events::Subscribers;
use crate::eviction::EvictionList;
use crate::free::FreeBlocks;
use crate::offload::{Queue, WrittenThrough};
use crate::prefix::{Entry, PrefixTree};
use crate::{BlockId, PoolGroup, Span, Stats};

pub(crate) use allocate::Leftovers;
pub(crate) use cache::{Content, Query};
pub(crate) use counts::Why;
use resident::Resident;
pub(crate) use write::Reservation;

#[derive(Debug)]
pub(crate) struct Ledger {
    groups: Groups,
    /// How many lists use each block of any group.
    ref_counts: Vec<u32>,
    tree: PrefixTree,
    evictable: EvictionList,
    /// How many units all groups together may take, and how many the blocks in use and the evictable blocks take. While
    /// a thread deals with leftovers, they count as in use, and the sum can pass the budget.
    budget: usize,
    units_in_use: usize,
    units_evictable: usize,
    subscribers: Subscribers,
    stats: Stats,
    /// How many resets of the prefix cache there have been. A list that got its first block in an earlier epoch caches
    /// nothing.
    epoch: u64,
    block_size: usize,
    /// Blocks whose content must still be dealt with outside of the lock.
    leftovers: Leftovers,
    /// Where blocks go that leave, if they do.
    offload: Option<Arc<Queue>>,
    /// Blocks that became cached and are to be written through to a tier.
    written_through: Vec<WrittenThrough>,
}

/// The groups. The first one has a place of its own: in a pool with one group no list is looked into.
#[derive(Debug)]
struct Groups {
    first: Group,
    others: Vec<Group>,
}

impl Groups {
    #[inline(always)]
    fn len(&self) -> usize {
        1 + self.others.len()
    }

    fn iter(&self) -> impl Iterator<Item = &Group> {
        std::iter::once(&self.first).chain(&self.others)
    }
}

impl Index<usize> for Groups {
    type Output = Group;

    #[inline(always)]
    fn index(&self, group: usize) -> &Group {
        if group == 0 { &self.first } else { &self.others[group - 1] }
    }
}

impl IndexMut<usize> for Groups {
    #[inline(always)]
    fn index_mut(&mut self, group: usize) -> &mut Group {
        if group == 0 { &mut self.first } else { &mut self.others[group - 1] }
    }
}

/// The blocks of one group.
#[derive(Debug)]
struct Group {
    /// The entry of its first block.
    first: Entry,
    free: FreeBlocks,
    /// How many units of the budget a block takes.
    units: usize,
    /// Which blocks have memory; `None` for a group that shares it with no other.
    resident: Option<Resident>,
    spec: PoolGroup,
    /// How many blocks are evictable. Counted if there are several groups; of the only one, all evictable blocks are.
    evictable: usize,
}

/// A ref_count that grows beyond this is set back to it. As long as every list is dropped no ref_count comes near: more
/// lists than this take hundreds of gigabytes. The limit is for lists that are leaked by `std::mem::forget`: their
/// blocks are never freed, and a ref_count that wraps must not free them.
const MAX_REF_COUNT: u32 = 0xf000_0000;

impl Ledger {
    /// Bookkeeping for groups with this number of blocks each, which share a budget of `budget` units: the first one, and
    /// the others.
    pub(crate) fn new(
        budget: usize,
        first: (PoolGroup, usize),
        others: &[(PoolGroup, usize)],
        block_size: usize,
    ) -> Self {
        let mut blocks = 0;
        let mut group = |&(spec, n): &(PoolGroup, usize)| {
            let first = blocks;
            blocks += n;
            let resident = (!others.is_empty()).then(|| Resident::none(n));
            Group { first, free: FreeBlocks::all(n), units: spec.units, resident, spec, evictable: 0 }
        };
        let groups = Groups { first: group(&first), others: others.iter().map(&mut group).collect() };
        let tree = PrefixTree::new(blocks, tree_groups(&groups), block_size);
        Self {
            groups,
            ref_counts: vec![0; blocks],
            tree,
            evictable: EvictionList::empty(blocks),
            budget,
            units_in_use: 0,
            units_evictable: 0,
            subscribers: Subscribers::default(),
            stats: Stats::default(),
            epoch: 0,
            block_size,
            leftovers: Leftovers::default(),
            offload: None,
            written_through: Vec::new(),
        }
    }

    /// How many units can be allocated: the free ones, and those of evictable blocks.
    #[inline]
    pub(crate) fn available(&self) -> usize {
        self.budget.saturating_sub(self.units_in_use)
    }

    /// How many units neither blocks in use nor evictable blocks take.
    #[inline]
    pub(crate) fn free_units(&self) -> usize {
        self.available().saturating_sub(self.units_evictable)
    }

    /// How many units the evictable blocks take.
    pub(crate) fn evictable(&self) -> usize {
        self.units_evictable
    }

    /// How many blocks of a group are in use, and how many are evictable.
    pub(crate) fn blocks_of_group(&self, group: usize) -> (usize, usize) {
        let Group { free, evictable, .. } = &self.groups[group];
        let evictable = if self.groups.len() == 1 { self.evictable.len() } else { *evictable };
        (free.blocks() - free.len() - evictable, evictable)
    }

    pub(crate) fn stats(&self) -> Stats {
        self.stats
    }

    /// The entry of a group's block.
    #[inline]
    fn entry(&self, group: usize, id: BlockId) -> Entry {
        if group == 0 { id.index() } else { self.groups[group].first + id.index() }
    }

    /// The group and the id of a block.
    #[inline]
    fn block(&self, entry: Entry) -> (usize, BlockId) {
        // In a pool with one group nothing is searched.
        let group = self.groups.others.iter().rposition(|of| of.first <= entry).map_or(0, |at| at + 1);
        (group, BlockId::new(entry - self.groups[group].first))
    }
}

/// What the prefix tree has to know of the groups.
fn tree_groups(groups: &Groups) -> SmallVec<[(Span, Entry); 1]> {
    groups.iter().map(|group| (group.spec.span, group.first)).collect()
}
