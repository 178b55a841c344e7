//! What the pool requires of the memory of its blocks.

use crate::{BlockId, StorageError};

/// The memory of the blocks of a pool, or of one of its groups of layers.
///
/// The pool makes these calls outside its lock, and only for blocks that cannot be allocated or evicted meanwhile. There
/// is one exception: a block that is written through to a [`Tier`](crate::Tier) may be evicted and written by others
/// while it is [`read`](Self::read). Then the bytes may be anything, and the pool discards them.
pub trait BlockStorage: Send + Sync {
    /// Copies the whole of block `from`, all layers, to block `to`. The pool calls this before a sequence writes to a
    /// block that is cached or that other sequences use.
    ///
    /// # Errors
    ///
    /// [`StorageError`] when the memory cannot be read or written.
    fn copy(&self, from: BlockId, to: BlockId) -> Result<(), StorageError>;

    /// Appends the bytes of a block, all layers, to `bytes`.
    ///
    /// # Errors
    ///
    /// As [`copy`](Self::copy).
    fn read(&self, id: BlockId, bytes: &mut Vec<u8>) -> Result<(), StorageError>;

    /// Writes bytes that [`read`](Self::read) has returned.
    ///
    /// # Errors
    ///
    /// As [`copy`](Self::copy).
    fn write(&self, id: BlockId, bytes: &[u8]) -> Result<(), StorageError>;

    /// How many bytes [`read`](Self::read) appends.
    fn bytes_per_block(&self) -> usize;

    /// Gives the memory of blocks back to the system, which provides it again, with any content, when they are written
    /// next. Only a pool whose groups share their memory calls this, for blocks that no sequence uses. Without an
    /// implementation the process keeps the memory.
    fn release(&self, ids: &[BlockId]) {
        let _ = ids;
    }

    /// Whether blocks are [poisoned](Self::poison) when they become free. The pool calls this once, when it is made.
    fn poisons(&self) -> bool {
        false
    }

    /// Overwrites blocks that no sequence may read any more, so that a later read of them shows in its results: numbers
    /// become NaN.
    ///
    /// # Errors
    ///
    /// As [`copy`](Self::copy).
    fn poison(&self, ids: &[BlockId]) -> Result<(), StorageError> {
        let _ = ids;
        Ok(())
    }
}

/// Storage without any bytes: for planning, simulation and tests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NoStorage;

impl BlockStorage for NoStorage {
    fn copy(&self, _: BlockId, _: BlockId) -> Result<(), StorageError> {
        Ok(())
    }

    fn read(&self, _: BlockId, _: &mut Vec<u8>) -> Result<(), StorageError> {
        Ok(())
    }

    fn write(&self, _: BlockId, _: &[u8]) -> Result<(), StorageError> {
        Ok(())
    }

    fn bytes_per_block(&self) -> usize {
        0
    }
}
