//! What the pool asks of the memory behind its blocks.

use crate::{BlockId, StorageError};

/// The bytes behind a pool's blocks.
///
/// The pool's books know nothing of tensors. They call the storage for the one thing that ownership demands: a block
/// that several sequences share is copied before one of them writes to it. The pool makes these calls outside its
/// lock, and holds both blocks while they last.
pub trait BlockStorage: Send + Sync {
    /// Copies the whole of block `from`, all layers, to block `to`.
    fn copy(&self, from: BlockId, to: BlockId) -> Result<(), StorageError>;
}

/// No bytes at all: a pool for planning, simulation and tests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NoStorage;

impl BlockStorage for NoStorage {
    fn copy(&self, _: BlockId, _: BlockId) -> Result<(), StorageError> {
        Ok(())
    }
}
