//! The pool: a handle that many threads share.

use std::fmt;

use crate::ledger::{Ledger, Query};
use crate::storage::NoStorage;
use crate::sync::{Arc, Mutex, MutexGuard, lock};
use crate::{
    BlockId, BlockStorage, Blocks, Inconsistent, KvEvents, OutOfBlocks, PoolError, PrefixKey, PrefixMatch, Stats,
};

/// The most slots of a pool. They are counted in 32 bits, signed, so that index tensors of any integer type can hold
/// them.
pub(crate) const MAX_SLOTS: usize = i32::MAX as usize;

/// How many evictable blocks a reset frees at a time under the lock: it takes some tens of microseconds.
const FREED_AT_ONCE: usize = 1024;

/// A pool of fixed-size token blocks. Cloning gives another handle to the same pool.
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

struct Inner {
    ledger: Mutex<Ledger>,
    storage: Box<dyn BlockStorage>,
    blocks: usize,
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
        check_size(blocks, block_size)?;
        Ok(Self(Arc::new(Inner {
            ledger: Mutex::new(Ledger::new(blocks, block_size)),
            poisons: storage.poisons(),
            storage: Box::new(storage),
            blocks,
            block_size,
        })))
    }

    /// Allocates `n` blocks, adjacent where possible. They are freed when the returned value is dropped.
    ///
    /// # Errors
    ///
    /// [`OutOfBlocks`] when fewer than `n` are available; then none is allocated.
    #[inline]
    pub fn allocate(&self, n: usize) -> Result<Blocks, OutOfBlocks> {
        let mut blocks = Blocks::empty(self);
        blocks.grow(n)?;
        Ok(blocks)
    }

    /// How many blocks the pool has.
    #[inline]
    pub fn blocks(&self) -> usize {
        self.0.blocks
    }

    /// How many tokens fit in a block.
    #[inline]
    pub fn block_size(&self) -> usize {
        self.0.block_size
    }

    /// How many blocks can be allocated at this moment: the free ones, and the [evictable](Self::evictable) ones, which
    /// are evicted for it.
    pub fn available(&self) -> usize {
        self.ledger().available()
    }

    /// How many blocks are evictable: cached and not in use.
    pub fn evictable(&self) -> usize {
        self.ledger().evictable()
    }

    /// How many blocks are in use. A block that several sequences share counts once.
    pub fn in_use(&self) -> usize {
        self.blocks() - self.available()
    }

    /// How many blocks `tokens` tokens need.
    #[inline]
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size())
    }

    /// Whether `other` is a handle to the same pool.
    pub fn is_same(&self, other: &BlockPool) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Looks up how much of `prompt` is cached, and how many [available](Self::available) blocks a new sequence would
    /// take to use that and to have slots for the whole prompt. For a scheduler: no block is used, and the statistics
    /// do not change. The last token is never part of the match, because its logits must be computed.
    pub fn lookup_prefix(&self, key: &PrefixKey, prompt: &[u32]) -> PrefixMatch {
        let known = &prompt[..prompt.len().saturating_sub(1)];
        self.ledger().lookup_prefix(Query { key, at: 0, last: None, tokens: known }, prompt.len())
    }

    /// Uncaches every prefix, for example after the model's weights have changed: what was computed with the old
    /// weights must not be matched again. Sequences keep the blocks that they use.
    pub fn reset_prefix_cache(&self) {
        // Dropping the old tree walks all of it, which takes long: this happens without the lock.
        let old_tree = self.ledger().reset();
        drop(old_tree);
        loop {
            let mut freed = Freed { pool: self, ids: Vec::new() };
            let to_poison = self.0.poisons.then_some(&mut freed.ids);
            let more = self.ledger().free_uncached(FREED_AT_ONCE, to_poison);
            self.poison(&freed.ids);
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
        let (past, live) = self.ledger().subscribe();
        KvEvents::new(past.events(), live)
    }

    /// Checks every invariant that the pool's own bookkeeping can show. It walks the whole pool. No other thread may be
    /// in [`reset_prefix_cache`](Self::reset_prefix_cache) meanwhile.
    ///
    /// # Errors
    ///
    /// [`Inconsistent`] names the first block whose bookkeeping is wrong: a defect of this crate.
    pub fn check(&self) -> Result<(), Inconsistent> {
        self.ledger().check()
    }

    /// Does the same as [`check`](Self::check), and checks that the ref_count of each block is the number of times that
    /// it occurs in `lists`. `lists` must be all the lists that use blocks, and no other thread may change one
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// [`Inconsistent`] names the first block whose ref_count is too high (it leaked) or too low.
    pub fn check_ref_counts<'a>(&self, lists: impl IntoIterator<Item = &'a [BlockId]>) -> Result<(), Inconsistent> {
        // The caller's iterator runs without the lock: it may call the pool.
        let mut counted = vec![0u32; self.blocks()];
        for id in lists.into_iter().flatten() {
            match counted.get_mut(id.index()) {
                Some(count) => *count = count.saturating_add(1),
                None => return Err(Inconsistent(format!("{id:?} is not a block of this pool"))),
            }
        }
        self.ledger().check_counted(&counted)
    }

    pub(crate) fn storage(&self) -> &dyn BlockStorage {
        &*self.0.storage
    }

    /// Decrements the ref_count of each block. If the storage poisons free blocks, it does so outside the lock, and
    /// before the blocks can be allocated again.
    #[inline]
    pub(crate) fn free(&self, ids: &[BlockId]) {
        if ids.is_empty() {
            return;
        }
        // While a panic unwinds, the code that panicked may still be using the storage.
        if !self.0.poisons || std::thread::panicking() {
            return self.ledger().free(ids);
        }
        // Dropped at the end, even if the storage panics: this frees the blocks.
        let freed = Freed { pool: self, ids: self.ledger().free_except_last_refs(ids) };
        self.poison(&freed.ids);
    }

    /// Overwrites blocks whose content is not needed any more, if the storage does that.
    pub(crate) fn poison(&self, ids: &[BlockId]) {
        if self.0.poisons
            && !ids.is_empty()
            && let Err(error) = self.storage().poison(ids)
        {
            tracing::warn!(%error, "free blocks could not be poisoned");
        }
    }

    /// Nothing that runs under this lock can panic half-way, so the ledger is consistent even if the lock is poisoned.
    #[inline]
    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.0.ledger)
    }
}

/// Blocks with a ref_count of 1, which are freed when this is dropped.
struct Freed<'p> {
    pool: &'p BlockPool,
    ids: Vec<BlockId>,
}

impl Drop for Freed<'_> {
    fn drop(&mut self) {
        self.pool.ledger().free(&self.ids);
    }
}

impl fmt::Debug for BlockPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockPool")
            .field("blocks", &self.blocks())
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
