//! What can go wrong around a step.

use block_pool::{OutOfBlocks, PoolError, ReserveError, StorageError};
use thiserror::Error;

/// A cache cannot be made as asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The pool's numbers, or its memory.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The memory given is less than one block takes.
    #[error("{bytes} bytes do not hold one block, which takes {bytes_per_block}")]
    TooLittleMemory {
        /// The memory given.
        bytes: usize,
        /// What one block takes over all layers.
        bytes_per_block: usize,
    },
    /// The fused backend and its kernels exist for CPUs only.
    #[error("the fused backend needs the tensors on a CPU; use the gather backend")]
    FusedNeedsCpu,
    /// Sums of products of 8-bit numbers have room for a number of dimensions.
    #[error("heads of {head_dim} dimensions are too large for 8-bit storage, which takes up to {most}")]
    TooManyDimensions {
        /// Dimensions per head.
        head_dim: usize,
        /// The most there can be.
        most: usize,
    },
    /// The kernel needs instructions that this machine does not have.
    #[error("this machine cannot run the {0} kernel")]
    KernelUnavailable(&'static str),
}

/// A sequence could not join a step. The sequence, the step and the pool are as before.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PushError {
    /// The pool has too few free blocks: wait, or preempt somebody.
    #[error(transparent)]
    OutOfBlocks(#[from] OutOfBlocks),
    /// A shared block had to be copied, and the device refused.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A sequence takes part in a step with at least one token.
    #[error("a sequence joins a step with at least one token")]
    NoTokens,
    /// The table's blocks belong to another cache's pool.
    #[error("the table belongs to another pool")]
    ForeignTable,
    /// Attention has begun: the step's tokens are settled.
    #[error("a sequence cannot join a step after its first attention")]
    Started,
}

/// A step cannot be committed as asked. Its sequences are rolled back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CommitError {
    /// There is not one number for each sequence.
    #[error("accepted tokens are given for {accepted} sequences, {pushed} take part")]
    Sequences {
        /// The numbers given.
        accepted: usize,
        /// The sequences in the step.
        pushed: usize,
    },
    /// A sequence has fewer new tokens than were accepted.
    #[error("{accepted} tokens of sequence {sequence} are accepted, {pushed} were pushed")]
    Tokens {
        /// The sequence, counted in the order of pushes.
        sequence: usize,
        /// The tokens accepted.
        accepted: usize,
        /// The tokens it has in the step.
        pushed: usize,
    },
    /// A layer has no keys and values of the new tokens: whoever found them by their prefix would read what was left
    /// there.
    #[error("layer {layer} was not written in this step: the cache has {layers} layers")]
    Unwritten {
        /// The first such layer.
        layer: usize,
        /// The layers there are.
        layers: usize,
    },
}

impl From<ReserveError> for PushError {
    fn from(error: ReserveError) -> Self {
        match error {
            ReserveError::OutOfBlocks(error) => Self::OutOfBlocks(error),
            ReserveError::Storage(error) => Self::Storage(error),
        }
    }
}
