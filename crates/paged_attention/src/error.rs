//! Errors of building a cache, of joining a step, and of committing it.

use std::ops::Range;

use block_pool::{OutOfBlocks, PoolError, ReserveError, StorageError};
use thiserror::Error;

/// A cache could not be built.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The pool's numbers are invalid, or its memory could not be allocated.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The given memory is less than the size of one block of each group of layers.
    #[error("{bytes} bytes do not hold one block, which takes {bytes_per_block} bytes")]
    TooLittleMemory {
        /// The given memory, in bytes.
        bytes: usize,
        /// The size of one block in bytes, over all layers.
        bytes_per_block: usize,
    },
    /// No group of layers was given.
    #[error("a cache needs at least one group of layers")]
    NoGroups,
    /// A group has no layers.
    #[error("group {group} has no layers: leave it out")]
    EmptyGroup {
        /// The index of the group.
        group: usize,
    },
    /// A layer is in no group of layers, or in several.
    #[error("the groups must have each layer once: layer {layer} {problem}")]
    Layers {
        /// The layer.
        layer: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Several groups of layers share their memory through the pages of the system, which is possible on CPUs only.
    #[error("a cache with several groups of layers needs a CPU")]
    GroupsNeedCpu,
    /// The fused backend runs on CPUs only.
    #[error("the fused backend runs on a CPU only; use the gather backend on other devices")]
    FusedNeedsCpu,
    /// The heads have too many dimensions for 8-bit storage: the integer sums of products would overflow.
    #[error("heads of {head_dim} dimensions are too large for 8-bit storage, which takes at most {most}")]
    TooManyDimensions {
        /// The dimensions per head.
        head_dim: usize,
        /// The maximum for 8-bit storage.
        most: usize,
    },
    /// The kernel needs instructions that this machine lacks.
    #[error("this machine cannot run the {0} kernel")]
    KernelUnavailable(&'static str),
}

/// A sequence could not join a step. The sequence, the step and the pool are unchanged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PushError {
    /// The pool has too few available blocks: wait, or preempt another sequence.
    #[error(transparent)]
    OutOfBlocks(#[from] OutOfBlocks),
    /// A shared or cached block had to be copied (copy-on-write), and the copy failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// No tokens were given.
    #[error("a sequence needs at least one token to join a step")]
    NoTokens,
    /// The table's blocks belong to another cache's pool.
    #[error("the table belongs to another pool")]
    ForeignTable,
    /// A range of tokens that see each other is empty, goes beyond the tokens, or overlaps another one.
    #[error("{}..{} is empty, beyond the {tokens} tokens, or overlaps another such range", range.start, range.end)]
    Bidirectional {
        /// The range.
        range: Range<usize>,
        /// How many tokens were pushed.
        tokens: usize,
    },
    /// A layer of the step was already written, so the rows of the step can no longer change.
    #[error("a sequence cannot join a step after its first layer was written")]
    Started,
}

/// A step could not be committed. Its sequences were rolled back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CommitError {
    /// The number of accepted counts differs from the number of sequences.
    #[error("accepted tokens are given for {accepted} sequences, but the step has {pushed}")]
    Sequences {
        /// How many counts were given.
        accepted: usize,
        /// How many sequences the step has.
        pushed: usize,
    },
    /// More tokens of a sequence were accepted than were pushed.
    #[error("{accepted} tokens of sequence {sequence} are accepted, but only {pushed} were pushed")]
    Tokens {
        /// The index of the sequence, in the order of pushes.
        sequence: usize,
        /// How many of its tokens were accepted.
        accepted: usize,
        /// How many of its tokens were pushed.
        pushed: usize,
    },
    /// A layer was not written. A sequence that matched the new tokens as a prefix would read what was left in the
    /// blocks.
    #[error("layer {layer} was not written in this step: the cache has {layers} layers")]
    Unwritten {
        /// The first layer that was not written.
        layer: usize,
        /// How many layers the cache has.
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
