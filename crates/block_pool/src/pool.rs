//! The pool: a handle that many threads share.

use std::fmt;

use crate::ledger::{Ledger, Sought};
use crate::storage::NoStorage;
use crate::sync::{Arc, Mutex, MutexGuard, lock};
use crate::{BlockId, BlockStorage, Blocks, Found, Inconsistent, OutOfBlocks, PoolError, PoolEvents, PrefixKey, Stats};

/// Slots are counted in 32 bits, signed, so that index tensors of any integer type can hold them.
pub(crate) const MAX_SLOTS: usize = i32::MAX as usize;

/// Remembered blocks that a reset frees under one lock: some tens of microseconds.
const FREED_AT_ONCE: usize = 1024;

/// A pool of fixed-size token blocks. Cloning gives another handle to the same pool.
///
/// ```
/// use block_pool::{BlockPool, OutOfBlocks};
///
/// let pool = BlockPool::new(/* blocks */ 8, /* tokens per block */ 16)?;
/// let mut blocks = pool.take(3)?;
/// blocks.grow(2)?;
/// assert_eq!(pool.available(), 3);
///
/// // All or nothing: a failed request changes nothing.
/// assert_eq!(pool.take(4).unwrap_err(), OutOfBlocks { requested: 4, available: 3 });
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
    /// A pool of `blocks` blocks of `block_size` tokens each, without memory behind them: bookkeeping alone.
    ///
    /// # Errors
    ///
    /// [`PoolError`] when one of the numbers is 0, or their product is beyond 2³¹ - 1 slots.
    pub fn new(blocks: usize, block_size: usize) -> Result<Self, PoolError> {
        Self::with_storage(blocks, block_size, NoStorage)
    }

    /// A pool whose blocks lie in `storage`, which it asks to copy a block when a shared one is about to be written.
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

    /// Takes `n` blocks, neighbours where possible. They go back to the pool when the returned value is dropped.
    ///
    /// # Errors
    ///
    /// [`OutOfBlocks`] when fewer than `n` are available; then none was taken.
    #[inline]
    pub fn take(&self, n: usize) -> Result<Blocks, OutOfBlocks> {
        let mut blocks = Blocks::none(self);
        blocks.grow(n)?;
        Ok(blocks)
    }

    /// How many blocks the pool has.
    #[inline]
    pub fn blocks(&self) -> usize {
        self.0.blocks
    }

    /// How many tokens a block holds.
    #[inline]
    pub fn block_size(&self) -> usize {
        self.0.block_size
    }

    /// How many blocks a request could get at this moment: the free ones, and the
    /// [remembered](Self::remembered) ones, which give way.
    pub fn available(&self) -> usize {
        self.ledger().available()
    }

    /// How many blocks nobody holds, and can be found by their tokens until their memory is needed.
    pub fn remembered(&self) -> usize {
        self.ledger().remembered()
    }

    /// How many blocks somebody holds. A block that several sequences share counts once.
    pub fn held(&self) -> usize {
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

    /// How much of a prompt is cached, and how many blocks a new sequence would take to use that and to have slots for all of
    /// the prompt, without holding or counting it: for a scheduler. The last token is always left to compute, since its
    /// logits are needed.
    pub fn find(&self, key: &PrefixKey, prompt: &[u32]) -> Found {
        let known = &prompt[..prompt.len().saturating_sub(1)];
        self.ledger().find(Sought { key, at: 0, last: None, tokens: known }, prompt.len())
    }

    /// Forgets every cached prefix: after the model's weights have changed, say, when what was computed with the old ones
    /// must not be found again. Sequences keep the blocks that they hold.
    pub fn reset(&self) {
        // A walk over the tree is long: it is dropped without the lock.
        let forgotten = self.ledger().forget_all();
        drop(forgotten);
        loop {
            let mut held = Freed { pool: self, ids: Vec::new() };
            let to_poison = self.0.poisons.then_some(&mut held.ids);
            let more = self.ledger().free_forgotten(FREED_AT_ONCE, to_poison);
            self.poison(&held.ids);
            if !more {
                return;
            }
        }
    }

    /// How often prefixes were sought and found, and what it cost.
    pub fn stats(&self) -> Stats {
        self.ledger().stats()
    }

    /// A stream of what becomes findable and what is forgotten, in order, for a router that sends a request to the cache
    /// which knows its prefix. It begins with what is cached now, and ends when the pool does.
    ///
    /// Events wait in the receiver until they are read; dropping it ends the stream. Nothing is recorded while nobody
    /// listens. The cached tokens are copied under the pool's lock: some 40 ns for each block, and others wait meanwhile.
    pub fn listen(&self) -> PoolEvents {
        let (past, live) = self.ledger().listen();
        PoolEvents::new(past.events(), live)
    }

    /// Checks every invariant of the books that can be seen from inside: a walk over the whole pool, at rest: no other thread
    /// is in a reset.
    ///
    /// # Errors
    ///
    /// [`Inconsistent`] names the first block whose books are wrong: a defect of this crate.
    pub fn check(&self) -> Result<(), Inconsistent> {
        self.ledger().check()
    }

    /// Like [`check`](Self::check), and that every block is counted exactly as often as `lists` name it. The lists
    /// must be all that hold blocks, at rest.
    ///
    /// # Errors
    ///
    /// [`Inconsistent`] names the first block that leaked or was counted short.
    pub fn check_held<'a>(&self, lists: impl IntoIterator<Item = &'a [BlockId]>) -> Result<(), Inconsistent> {
        // The caller's iterator runs without the lock: it may ask the pool.
        let mut counted = vec![0u32; self.blocks()];
        for id in lists.into_iter().flatten() {
            match counted.get_mut(id.index()) {
                Some(count) => *count = count.saturating_add(1),
                None => return Err(Inconsistent(format!("{id:?} is not of this pool"))),
            }
        }
        self.ledger().check_counted(&counted)
    }

    pub(crate) fn storage(&self) -> &dyn BlockStorage {
        &*self.0.storage
    }

    /// One holder less for each block. Where free blocks are poisoned, that happens before anybody else can be given
    /// them, and outside the lock.
    #[inline]
    pub(crate) fn release(&self, ids: &[BlockId]) {
        if ids.is_empty() {
            return;
        }
        // While a panic unwinds, the storage may be in the hands of the one who panicked.
        if !self.0.poisons || std::thread::panicking() {
            return self.ledger().release(ids);
        }
        // Freed at the end, by a panic of the storage too.
        let freed = Freed { pool: self, ids: self.ledger().release_but_free(ids) };
        self.poison(&freed.ids);
    }

    /// Overwrites blocks whose content is nobody's, if the storage does that.
    pub(crate) fn poison(&self, ids: &[BlockId]) {
        if self.0.poisons
            && !ids.is_empty()
            && let Err(error) = self.storage().poison(ids)
        {
            tracing::warn!(%error, "free blocks could not be poisoned");
        }
    }

    /// Nothing that runs under this lock can panic half-way, so the books of a poisoned lock are whole.
    #[inline]
    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.0.ledger)
    }
}

/// Blocks that nobody else holds, and that become free when this is dropped.
struct Freed<'p> {
    pool: &'p BlockPool,
    ids: Vec<BlockId>,
}

impl Drop for Freed<'_> {
    fn drop(&mut self) {
        self.pool.ledger().release(&self.ids);
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
