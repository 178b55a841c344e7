//! The pool: a handle that many threads share.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ledger::Ledger;
use crate::storage::NoStorage;
use crate::{BlockId, BlockStorage, Blocks, Inconsistent, OutOfBlocks, PoolError};

/// Slots are counted in 32 bits, signed, so that index tensors of any integer type can hold them.
pub(crate) const MAX_SLOTS: usize = i32::MAX as usize;

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
            ledger: Mutex::new(Ledger::new(blocks)),
            storage: Box::new(storage),
            blocks,
            block_size,
        })))
    }

    /// Takes `n` blocks, neighbours where possible. They go back to the pool when the returned value is dropped.
    ///
    /// # Errors
    ///
    /// [`OutOfBlocks`] when fewer than `n` are free; then none was taken.
    pub fn take(&self, n: usize) -> Result<Blocks, OutOfBlocks> {
        let mut blocks = Blocks::none(self);
        blocks.grow(n)?;
        Ok(blocks)
    }

    /// How many blocks the pool has.
    pub fn blocks(&self) -> usize {
        self.0.blocks
    }

    /// How many tokens a block holds.
    pub fn block_size(&self) -> usize {
        self.0.block_size
    }

    /// How many blocks a request could get at this moment.
    pub fn available(&self) -> usize {
        self.ledger().available()
    }

    /// How many blocks somebody holds. A block that several sequences share counts once.
    pub fn held(&self) -> usize {
        self.blocks() - self.available()
    }

    /// How many blocks `tokens` tokens need.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size())
    }

    /// Whether `other` is a handle to the same pool.
    pub fn is_same(&self, other: &BlockPool) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Checks every invariant of the books that can be seen from inside: a walk over the whole pool.
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
        self.ledger().check_held(lists.into_iter())
    }

    pub(crate) fn storage(&self) -> &dyn BlockStorage {
        &*self.0.storage
    }

    /// Nothing that runs under this lock can panic half-way, so the books of a poisoned lock are whole.
    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.ledger.lock().unwrap_or_else(PoisonError::into_inner)
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
