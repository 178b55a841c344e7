//! What the pool asks of the memory behind its blocks.

use crate::{BlockId, StorageError};

/// The memory behind a pool's blocks, seen by the pool.
///
/// The pool makes these calls outside its lock, and only for blocks that the caller holds meanwhile.
pub trait BlockStorage: Send + Sync {
    /// Copies the whole of block `from`, all layers, to block `to`: a block that several sequences share is copied
    /// before one of them writes to it.
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

    /// Writes what [`read`](Self::read) has read.
    ///
    /// # Errors
    ///
    /// As [`copy`](Self::copy).
    fn write(&self, id: BlockId, bytes: &[u8]) -> Result<(), StorageError>;

    /// How many bytes [`read`](Self::read) reads.
    fn bytes_per_block(&self) -> usize;

    /// Whether blocks are to be poisoned when they become free. Asked once, when the pool is made.
    fn poisons(&self) -> bool {
        false
    }

    /// Overwrites blocks that nobody may read any more with something that shows itself when it is read: NaN, for
    /// numbers.
    ///
    /// # Errors
    ///
    /// As [`copy`](Self::copy).
    fn poison(&self, ids: &[BlockId]) -> Result<(), StorageError> {
        let _ = ids;
        Ok(())
    }
}

/// No bytes at all: a pool for planning, simulation and tests.
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
