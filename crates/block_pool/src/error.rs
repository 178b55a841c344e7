//! What can go wrong: one type for each error that a caller handles in its own way.

use thiserror::Error;

/// The pool has fewer blocks available than a request needs. Nothing was allocated. If the pool has several groups of
/// layers, both numbers are units, over all groups.
///
/// This is the one error that a scheduler acts on: wait, or preempt a sequence, and try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("asked for {requested} blocks, {available} are available")]
pub struct OutOfBlocks {
    /// How many blocks the request needs.
    pub requested: usize,
    /// How many blocks are available.
    pub available: usize,
}

/// A block is cached already: it has the content of another computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the block is cached already, under the tokens that it was computed for")]
pub struct AlreadyCached;

/// The memory of the blocks could not be copied, read or written.
#[derive(Debug, Error)]
#[error("block storage: {0}")]
pub struct StorageError(#[from] Box<dyn std::error::Error + Send + Sync>);

impl StorageError {
    /// Wraps the failure of a [`BlockStorage`](crate::BlockStorage).
    pub fn new(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(source.into())
    }
}

/// A reservation failed and changed nothing.
#[derive(Debug, Error)]
pub enum ReserveError {
    /// Too few blocks are available.
    #[error(transparent)]
    OutOfBlocks(#[from] OutOfBlocks),
    /// A shared or cached block could not be copied before the first write to it, or swapped content could not be
    /// written.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// A sequence cannot be truncated to this length: blocks that its next token would see were freed, by a window or by
/// [`free_before`](crate::Blocks::free_before). Compute the sequence again, or use a larger window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "cannot truncate to {len} tokens: position {needed} would be visible again, but positions before {kept} were freed"
)]
pub struct OutOfWindow {
    /// The requested length.
    pub len: usize,
    /// The first position after the sink tokens that the next token would see.
    pub needed: usize,
    /// The first position after the sink tokens that was not freed.
    pub kept: usize,
}

/// A pool cannot be made from these numbers.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PoolError {
    /// A pool needs at least one block.
    #[error("a pool of 0 blocks holds nothing")]
    NoBlocks,
    /// A block needs at least one token.
    #[error("a block of 0 tokens holds nothing")]
    EmptyBlocks,
    /// The budget is less than one block of each group.
    #[error("a budget of {units} units does not hold one block of each group, which take {one_of_each}")]
    SmallBudget {
        /// The budget.
        units: usize,
        /// What one block of each group takes.
        one_of_each: usize,
    },
    /// Blocks and slots are counted in 32 bits.
    #[error("{blocks} blocks of {block_size} tokens are too many: a pool has at most {max} slots")]
    TooLarge {
        /// The blocks asked for.
        blocks: usize,
        /// The tokens per block asked for.
        block_size: usize,
        /// The most slots a pool can have.
        max: usize,
    },
    /// One of the dimensions of the keys and values is zero.
    #[error(
        "keys and values need at least one layer, head and dimension: {layers} layers, {kv_heads} heads, keys of \
         {head_dim} and values of {value_dim} dimensions"
    )]
    EmptyShape {
        /// Attention layers.
        layers: usize,
        /// Key and value heads per layer.
        kv_heads: usize,
        /// Dimensions of a key.
        head_dim: usize,
        /// Dimensions of a value.
        value_dim: usize,
    },
    /// Values that are the first dimensions of the keys have more dimensions than the keys.
    #[error("values of {value_dim} dimensions cannot be in keys of {head_dim}")]
    ValuesBeyondKeys {
        /// Dimensions of a key.
        head_dim: usize,
        /// Dimensions of a value.
        value_dim: usize,
    },
    /// The memory for the blocks cannot be allocated.
    #[error("{blocks} blocks of {bytes_per_block} bytes do not fit into this machine's memory")]
    OutOfMemory {
        /// The blocks asked for.
        blocks: usize,
        /// Bytes of one block over all layers.
        bytes_per_block: usize,
    },
    /// Keys and values cannot be stored in this type, or not on this device.
    #[error("keys and values cannot be stored as {0}; use f32, f16 or bf16")]
    UnsupportedDType(String),
    /// The device could not make the tensor.
    #[error("device tensor: {0}")]
    Device(String),
}

/// Blocks of a pool cannot go to a tier.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OffloadError {
    /// They go to one already.
    #[error("blocks of this pool go to a tier already")]
    Twice,
    /// The thread that stores them cannot be started.
    #[error("no thread can be started: {0}")]
    Thread(#[source] std::io::Error),
}

/// The pool's bookkeeping contradicts itself: a defect of this crate, found by [`BlockPool::check`].
///
/// [`BlockPool::check`]: crate::BlockPool::check
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the pool is inconsistent: {0}")]
pub struct Inconsistent(pub(crate) String);
