//! The pool: a handle that many threads share.

use std::fmt;
use std::ops::Range;

use crate::ledger::{Ledger, Leftovers, Query, Why};
use crate::list::Ids;
use crate::offload::{Evictee, Queue, WrittenThrough};
use crate::storage::NoStorage;
use crate::sync::{Arc, Mutex, MutexGuard, Weak, downgrade, lock, upgrade};
use crate::{
    BlockId, BlockStorage, Blocks, GroupBlock, GroupBlocks, Inconsistent, KvEvents, OutOfBlocks, PoolError, PoolGroup,
    PrefixKey, PrefixMatch, Stats, StorageError,
};

/// The most slots of a pool. They are counted in 32 bits, signed, so that index tensors of any integer type can hold
/// them.
pub(crate) const MAX_SLOTS: usize = i32::MAX as usize;

/// How many evictable blocks a reset frees at a time under the lock: it takes some tens of microseconds.
const FREED_AT_ONCE: usize = 1024;

/// A pool of fixed-size token blocks. Cloning gives another handle to the same pool.
///
/// A pool can have several groups of layers ([`with_groups`](Self::with_groups)). They share one budget, counted in
/// *units*: a block of group `g` takes `groups()[g].units` of them. In a pool with one group a unit is a block.
///
/// ```
/// use block_pool::{BlockPool, OutOfBlocks};
///
/// let pool = BlockPool::new(/* blocks */ 8, /* tokens per block */ 16)?;
/// let mut blocks = pool.allocate(3)?;
/// blocks.grow(2)?;
/// assert_eq!(pool.available(), 3);
///
/// // All or nothing: a failed request changes nothing.
/// assert_eq!(pool.allocate(4).unwrap_err(), OutOfBlocks { requested: 4, available: 3 });
///
/// drop(blocks);
/// assert_eq!(pool.available(), 8);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct BlockPool(Arc<Inner>);

/// A handle that does not keep the pool.
pub(crate) struct WeakPool(Weak<Inner>);

impl WeakPool {
    /// The pool, if it has not been dropped.
    pub(crate) fn upgrade(&self) -> Option<BlockPool> {
        upgrade(&self.0).map(BlockPool)
    }
}

impl fmt::Debug for WeakPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WeakPool")
    }
}

struct Inner {
    ledger: Mutex<Ledger>,
    /// One for each group.
    storages: Vec<Box<dyn BlockStorage>>,
    groups: Vec<PoolGroup>,
    units: usize,
    units_per_block: usize,
    most_blocks: usize,
    /// Whether there is one group, and its tokens see all tokens before them.
    is_simple: bool,
    block_size: usize,
    poisons: bool,
}

impl BlockPool {
    /// Makes a pool of `blocks` blocks of `block_size` tokens each, without memory: bookkeeping only.
    ///
    /// # Errors
    ///
    /// [`PoolError`] when one of the numbers is 0, or their product is larger than 2³¹ - 1 slots.
    pub fn new(blocks: usize, block_size: usize) -> Result<Self, PoolError> {
        Self::with_storage(blocks, block_size, NoStorage)
    }

    /// Makes a pool whose blocks lie in `storage`. Before a shared or cached block is written, the pool has `storage`
    /// copy it.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_storage(
        blocks: usize,
        block_size: usize,
        storage: impl BlockStorage + 'static,
    ) -> Result<Self, PoolError> {
        Self::with_groups(blocks, block_size, [(PoolGroup::new(1), Box::new(storage) as Box<dyn BlockStorage>)])
    }

    /// Makes a pool of several groups of layers without memory: bookkeeping only.
    ///
    /// # Errors
    ///
    /// As [`with_groups`](Self::with_groups).
    pub fn of_groups(units: usize, block_size: usize, groups: &[PoolGroup]) -> Result<Self, PoolError> {
        Self::with_groups(units, block_size, groups.iter().map(|&group| (group, Box::new(NoStorage) as _)))
    }

    /// Makes a pool of several groups of layers, whose blocks lie in a storage of each group. The groups share a budget
    /// of `units` units: at any time it can be used for blocks of any of them.
    ///
    /// A group never has more than [`blocks_of_group`](Self::blocks_of_group) blocks, and its storage needs room for this
    /// many. With several groups that is address space for more than the budget: the pool asks a storage to
    /// [release](BlockStorage::release) the memory of free blocks when another group needs it.
    ///
    /// # Errors
    ///
    /// [`PoolError`] when there is no group, a number is 0, all groups together have more than 2³¹ - 1 slots, or the
    /// budget does not hold one block of each group.
    pub fn with_groups(
        units: usize,
        block_size: usize,
        groups: impl IntoIterator<Item = (PoolGroup, Box<dyn BlockStorage>)>,
    ) -> Result<Self, PoolError> {
        let (groups, storages): (Vec<_>, Vec<_>) = groups.into_iter().unzip();
        let one_of_each = groups.iter().map(|group| group.units).fold(0, usize::saturating_add);
        if units == 0 || groups.iter().any(|group| group.units == 0) {
            return Err(PoolError::NoBlocks);
        }
        if units < one_of_each {
            return Err(PoolError::SmallBudget { units, one_of_each });
        }
        // The blocks of all groups are numbered together.
        let blocks = groups.iter().map(|group| units / group.units).fold(0, usize::saturating_add);
        check_size(blocks, block_size)?;
        let mut with_blocks = groups.iter().map(|&group| (group, units / group.units));
        let Some(first) = with_blocks.next() else { return Err(PoolError::NoBlocks) };
        let others: Vec<_> = with_blocks.collect();
        Ok(Self(Arc::new(Inner {
            ledger: Mutex::new(Ledger::new(units, first, &others, block_size)),
            poisons: storages.iter().any(|storage| storage.poisons()),
            storages,
            groups,
            units,
            units_per_block: one_of_each,
            most_blocks: units / one_of_each,
            is_simple: others.is_empty() && first.0.span.is_all(),
            block_size,
        })))
    }

    /// Allocates `n` blocks, in every group if there are several, adjacent where possible. They are freed when the
    /// returned value is dropped.
    ///
    /// # Errors
    ///
    /// [`OutOfBlocks`] when the pool has no room for all of them; then none is allocated.
    #[inline]
    pub fn allocate(&self, n: usize) -> Result<Blocks, OutOfBlocks> {
        let mut blocks = Blocks::empty(self);
        blocks.grow(n)?;
        Ok(blocks)
    }

    /// How many blocks the pool has; with several groups, how many units its budget has.
    #[inline]
    pub fn blocks(&self) -> usize {
        self.0.units
    }

    /// How many units the budget of all groups has.
    #[inline]
    pub fn units(&self) -> usize {
        self.0.units
    }

    /// The groups of layers.
    #[inline]
    pub fn groups(&self) -> &[PoolGroup] {
        &self.0.groups
    }

    /// How many blocks each list of a sequence can have at most at the same time.
    #[inline]
    pub(crate) fn most_blocks(&self) -> usize {
        self.0.most_blocks
    }

    /// Whether there is one group, and its tokens see all tokens before them.
    #[inline]
    pub(crate) fn is_simple(&self) -> bool {
        self.0.is_simple
    }

    /// How many blocks of a group there can be: as many as the whole budget has units for. 0 if there is no such group.
    pub fn blocks_of_group(&self, group: usize) -> usize {
        self.0.groups.get(group).map_or(0, |group| self.0.units / group.units)
    }

    /// How many blocks of a group are in use and evictable at this moment; none if there is no such group.
    pub fn usage(&self, group: usize) -> GroupBlocks {
        if group >= self.0.groups.len() {
            return GroupBlocks::default();
        }
        let (in_use, evictable) = self.ledger().blocks_of_group(group);
        GroupBlocks { in_use, evictable }
    }

    /// How many units of memory the blocks of all groups have, if groups share their memory: those that were ever
    /// allocated, and not [released](BlockStorage::release) since. The system counts in pages: of a page that blocks
    /// share, it keeps all until all of them are released in one call.
    pub fn resident(&self) -> usize {
        if self.0.groups.len() == 1 { self.0.units } else { self.ledger().resident() }
    }

    /// How many tokens fit in a block.
    #[inline]
    pub fn block_size(&self) -> usize {
        self.0.block_size
    }

    /// How many units can be allocated at this moment: the free ones, and those of [evictable](Self::evictable) blocks,
    /// which are evicted for it.
    pub fn available(&self) -> usize {
        self.ledger().available()
    }

    /// How many units evictable blocks take: cached and not in use.
    pub fn evictable(&self) -> usize {
        self.ledger().evictable()
    }

    /// How many units blocks in use take. A block that several sequences share counts once.
    pub fn in_use(&self) -> usize {
        self.units() - self.available()
    }

    /// How many blocks `tokens` tokens need.
    #[inline]
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size())
    }

    /// How many units a block of every group takes together.
    pub fn units_per_block(&self) -> usize {
        self.0.units_per_block
    }

    /// Whether `other` is a handle to the same pool.
    pub fn is_same(&self, other: &BlockPool) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Looks up how much of `prompt` is cached, and how many [available](Self::available) blocks a new sequence would
    /// take to use that and to have slots for the whole prompt. For a scheduler: no block is used, and the statistics
    /// do not change. The last token is never part of the match, because its logits must be computed.
    ///
    /// The sequence has no salts from a position on. For one that has, see [`Blocks::lookup_prefix`].
    pub fn lookup_prefix(&self, key: &PrefixKey, prompt: &[u32]) -> PrefixMatch {
        let known = &prompt[..prompt.len().saturating_sub(1)];
        let query = Query { key, at: 0, last: None, salts: &[], tokens: known };
        self.ledger().lookup_prefix(query, prompt.len(), None, |_| &[])
    }

    /// Uncaches every prefix, for example after the model's weights have changed: what was computed with the old
    /// weights must not be matched again. Sequences keep the blocks that they use. A [`Tier`](crate::Tier) below the pool
    /// keeps its blocks: for other weights, open one that finds nothing of the old ones.
    pub fn reset_prefix_cache(&self) {
        // Dropping the old tree walks all of it, which takes long: this happens without the lock.
        let old_tree = self.ledger().reset();
        drop(old_tree);
        loop {
            let mut freed = Freed { pool: self, blocks: Vec::new() };
            let to_poison = self.0.poisons.then_some(&mut freed.blocks);
            let more = self.ledger().free_uncached(FREED_AT_ONCE, to_poison);
            freed.poison();
            if !more {
                return;
            }
        }
    }

    /// How many tokens were queried and matched, and how many blocks were evicted and copied.
    pub fn stats(&self) -> Stats {
        self.ledger().stats()
    }

    /// Subscribes to the KV events: a stream of what becomes cached and what is evicted, in order, for a router that
    /// sends a request to the cache that has its prefix. The stream begins with what is cached now, and ends when the
    /// pool is dropped.
    ///
    /// Events wait in the receiver until they are read; dropping the receiver ends the stream. Without subscribers no
    /// events are made. The tokens that are cached now are copied under the pool's lock: this takes some 40 ns for each
    /// block, and other threads wait meanwhile.
    pub fn subscribe(&self) -> KvEvents {
        self.subscribe_within(usize::MAX)
    }

    /// As [`subscribe`](Self::subscribe), with at most this many events that wait in the receiver, so that a receiver that
    /// does not keep up takes no more memory than that. When there are more, all that wait are discarded, and the stream
    /// begins again: the next event is [`AllBlocksCleared`](crate::KvEvent::AllBlocksCleared), and then comes what is
    /// cached by then. So a receiver that applies all events has the right contents, but no history without gaps.
    pub fn subscribe_within(&self, most_waiting: usize) -> KvEvents {
        let (past, live) = self.ledger().subscribe(most_waiting);
        KvEvents::new(past.events(), live, WeakPool(downgrade(&self.0)))
    }

    /// Checks every invariant that the pool's own bookkeeping can show. It walks the whole pool. No other thread may be
    /// in [`reset_prefix_cache`](Self::reset_prefix_cache) meanwhile, or, if there are several groups, in a call that
    /// allocates blocks.
    ///
    /// # Errors
    ///
    /// [`Inconsistent`] names the first block whose bookkeeping is wrong: a defect of this crate.
    pub fn check(&self) -> Result<(), Inconsistent> {
        self.ledger().check()
    }

    /// Does the same as [`check`](Self::check), and checks that the ref_count of each block of the first group is the
    /// number of times that it occurs in `lists`. `lists` must be all the lists that use blocks, and no other thread may
    /// change one meanwhile.
    ///
    /// # Errors
    ///
    /// [`Inconsistent`] names the first block whose ref_count is too high (it leaked) or too low.
    pub fn check_ref_counts<'a>(&self, lists: impl IntoIterator<Item = &'a [BlockId]>) -> Result<(), Inconsistent> {
        self.check_ref_counts_of_group(0, lists)
    }

    /// Does the same as [`check_ref_counts`](Self::check_ref_counts) for a group.
    ///
    /// # Errors
    ///
    /// As [`check_ref_counts`](Self::check_ref_counts).
    pub fn check_ref_counts_of_group<'a>(
        &self,
        group: usize,
        lists: impl IntoIterator<Item = &'a [BlockId]>,
    ) -> Result<(), Inconsistent> {
        // The caller's iterator runs without the lock: it may call the pool.
        let mut counted = vec![0u32; self.blocks_of_group(group)];
        for id in lists.into_iter().flatten() {
            match counted.get_mut(id.index()) {
                Some(count) => *count = count.saturating_add(1),
                None => return Err(Inconsistent(format!("{id:?} is not a block of this pool"))),
            }
        }
        self.ledger().check_counted(group, &counted)
    }

    /// How often the prefix cache was [reset](Self::reset_prefix_cache).
    pub fn epoch(&self) -> u64 {
        self.ledger().epoch()
    }

    /// The bytes of a block of a group, all its layers; 0 if there is no such group.
    pub fn bytes_per_block(&self, group: usize) -> usize {
        if group < self.groups().len() { self.storage(group).bytes_per_block() } else { 0 }
    }

    pub(crate) fn storage(&self, group: usize) -> &dyn BlockStorage {
        &*self.0.storages[group]
    }

    /// Takes the blocks at `range` out of a list and frees them. If the storage, which may poison them, panics, the list
    /// does not have them any more.
    #[inline]
    pub(crate) fn free_range(&self, group: usize, ids: &mut Ids, range: Range<usize>, why: Why) {
        if self.0.poisons {
            let freed: Ids = ids.drain(range).collect();
            return self.free(group, &freed, why);
        }
        self.free(group, &ids[range.clone()], why);
        if range.end == ids.len() {
            ids.truncate(range.start);
        } else {
            ids.drain(range);
        }
    }

    /// Frees blocks of several groups, in this order. If the storage panics, all of them are freed nevertheless.
    pub(crate) fn free_lists<'b>(&self, lists: impl IntoIterator<Item = (usize, &'b [BlockId])>, why: Why) {
        let mut freed = Freed { pool: self, blocks: Vec::new() };
        let mut ledger = self.ledger();
        for (group, ids) in lists {
            if self.0.poisons && !std::thread::panicking() {
                let unfreed = ledger.free_except_last_refs(group, ids, why);
                freed.blocks.extend(unfreed.into_iter().map(|id| (group, id)));
            } else {
                ledger.free(group, ids, why);
            }
        }
        drop(ledger);
        if !freed.blocks.is_empty() {
            freed.poison();
        }
    }

    /// Decrements the ref_count of each block of a group. If the storage poisons free blocks, it does so outside the
    /// lock, and before the blocks can be allocated again.
    #[inline]
    pub(crate) fn free(&self, group: usize, ids: &[BlockId], why: Why) {
        if ids.is_empty() {
            return;
        }
        // While a panic unwinds, the code that panicked may still be using the storage.
        if !self.0.poisons || std::thread::panicking() {
            return self.ledger().free(group, ids, why);
        }
        let unfreed = self.ledger().free_except_last_refs(group, ids, why);
        // Dropped at the end, even if the storage panics: this frees the blocks.
        let freed = Freed { pool: self, blocks: unfreed.into_iter().map(|id| (group, id)).collect() };
        freed.poison();
    }

    /// Overwrites blocks whose content is not needed any more, if the storage does that.
    pub(crate) fn poison(&self, group: usize, ids: &[BlockId]) {
        if self.0.poisons
            && !ids.is_empty()
            && let Err(error) = self.storage(group).poison(ids)
        {
            tracing::warn!(%error, "free blocks could not be poisoned");
        }
    }

    /// Deals with the leftovers of an allocation, and returns their owner, which frees them.
    pub(crate) fn own(&self, leftovers: Leftovers) -> impl Drop + use<'_> {
        let Leftovers { mut evicted, mut unneeded, offloaded, queue } = leftovers;
        evicted.extend_from_slice(&unneeded);
        let freed = Freed { pool: self, blocks: evicted };
        if let Some(queue) = queue {
            self.stage(offloaded, &queue);
        }
        freed.poison();
        unneeded.sort_unstable();
        for of_group in unneeded.chunk_by(|a, b| a.0 == b.0) {
            let ids: Vec<BlockId> = of_group.iter().map(|&(_, id)| id).collect();
            self.storage(of_group[0].0).release(&ids);
        }
        freed
    }

    /// Copies the content of evicted blocks, which nobody else uses, to the staging buffer.
    #[cold]
    fn stage(&self, evicted: Vec<Evictee>, queue: &Queue) {
        // The tail of a sequence is evicted before its head, and is of no use without it.
        for Evictee { group, id, lineage } in evicted.into_iter().rev() {
            let size = self.storage(group).bytes_per_block();
            let Some(mut room) = queue.room_for(size) else { continue };
            let read = self.storage(group).read(id, &mut room.bytes);
            if read.is_ok() && room.bytes.len() == size {
                room.fill(group, lineage);
            }
        }
    }

    /// Reads a block that is cached, and may be evicted meanwhile. Returns false if it is not there any more.
    pub(crate) fn read_cached(&self, of: &WrittenThrough, bytes: &mut Vec<u8>) -> Result<bool, StorageError> {
        let GroupBlock { group, block } = of.block;
        loop {
            let Some(before) = self.ledger().removed_if_cached(of) else { return Ok(false) };
            bytes.clear();
            self.storage(group).read(block, bytes)?;
            // A block that is cached is never written. If it has been cached all the time, nobody has written to it.
            match self.ledger().removed_if_cached(of) {
                Some(after) if after == before => return Ok(true),
                // Another block with this lineage has left, or this one has left and come back.
                Some(_) => {}
                None => return Ok(false),
            }
        }
    }

    /// Nothing that runs under this lock can panic half-way, so the ledger is consistent even if the lock is poisoned.
    #[inline]
    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.0.ledger)
    }
}

/// Blocks with a ref_count of 1, each with its group, which are freed when this is dropped.
struct Freed<'p> {
    pool: &'p BlockPool,
    blocks: Vec<(usize, BlockId)>,
}

impl Freed<'_> {
    fn poison(&self) {
        if self.pool.0.poisons {
            for group in 0..self.pool.0.groups.len() {
                let own = self.blocks.iter().filter(|(of, _)| *of == group);
                self.pool.poison(group, &own.map(|&(_, id)| id).collect::<Vec<_>>());
            }
        }
    }
}

impl Drop for Freed<'_> {
    fn drop(&mut self) {
        let mut ledger = self.pool.ledger();
        self.blocks.iter().for_each(|&(group, id)| ledger.free(group, &[id], Why::Ended));
    }
}

impl fmt::Debug for BlockPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockPool")
            .field("units", &self.units())
            .field("groups", &self.groups().len())
            .field("block_size", &self.block_size())
            .field("available", &self.available())
            .finish()
    }
}

pub(crate) fn check_size(blocks: usize, block_size: usize) -> Result<(), PoolError> {
    match blocks.checked_mul(block_size) {
        _ if blocks == 0 => Err(PoolError::NoBlocks),
        _ if block_size == 0 => Err(PoolError::EmptyBlocks),
        Some(slots) if slots <= MAX_SLOTS => Ok(()),
        _ => Err(PoolError::TooLarge { blocks, block_size, max: MAX_SLOTS }),
    }
}
