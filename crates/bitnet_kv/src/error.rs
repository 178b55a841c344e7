//! What can go wrong, in the host's words where it has them.

use paged_attention::{CacheError, OutOfBlocks, OutOfWindow, ReserveError, StorageError, find_error, wrap_error};
use thiserror::Error;

/// A cache cannot do as asked. It is as it was before.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvError {
    /// The layer does not exist.
    #[error("Layer index {layer} out of bounds: the cache has {layers} layers")]
    Layer {
        /// The layer asked for.
        layer: usize,
        /// The layers there are.
        layers: usize,
    },
    /// A number that a cache is made of is 0.
    #[error("{0} must be > 0")]
    Zero(&'static str),
    /// Heads have an odd number of dimensions.
    #[error("head_dim must be > 0 and divisible by 4, got {0}")]
    HeadDim(usize),
    /// The choices of a cache do not go together.
    #[error("{0}")]
    Options(String),
    /// Keys and values have other shapes than the cache takes.
    #[error("KV cache expects {expected}, but received k {k:?} and v {v:?}")]
    Shape {
        /// The shape of the keys.
        k: Vec<usize>,
        /// The shape of the values.
        v: Vec<usize>,
        /// What they should be.
        expected: String,
    },
    /// Keys have another number of heads than the cache.
    #[error("KV cache expects {expected} heads, but received K tensor with {got} heads (k {k:?}, v {v:?})")]
    Heads {
        /// The heads of the cache.
        expected: usize,
        /// The heads of the keys.
        got: usize,
        /// The shape of the keys.
        k: Vec<usize>,
        /// The shape of the values.
        v: Vec<usize>,
    },
    /// A cache holds as many sequences as it began with.
    #[error("KV cache holds a batch of {expected}, but received one of {got} (k {k:?}, v {v:?})")]
    Batch {
        /// The sequences of the cache.
        expected: usize,
        /// The sequences given.
        got: usize,
        /// The shape of the keys.
        k: Vec<usize>,
        /// The shape of the values.
        v: Vec<usize>,
    },
    /// The tokens given do not lead from the length there is to the length asked for.
    #[error(
        "{tokens} tokens (k {k:?}, v {v:?}) do not lead from a length of {current} to {seq_len}: expected {expected}"
    )]
    Length {
        /// The tokens given.
        tokens: usize,
        /// The tokens that the layer holds.
        current: usize,
        /// The length asked for.
        seq_len: usize,
        /// How many tokens would lead there.
        expected: String,
        /// The shape of the keys.
        k: Vec<usize>,
        /// The shape of the values.
        v: Vec<usize>,
    },
    /// The tokens given as a whole sequence are not those that the layer holds.
    #[error(
        "token {at} of the {tokens} given is not the one that the layer holds, which has {current}: clear the cache for another \
         sequence; seq_len is the length of the sequence, so a pass of {tokens} tokens behind it leads to {}",
        current + tokens
    )]
    OtherTokens {
        /// The first position that differs.
        at: usize,
        /// The tokens given.
        tokens: usize,
        /// The tokens that the layer holds.
        current: usize,
    },
    /// Queries have another shape than fits the cache.
    #[error("q has shape {got:?}, expected {expected}")]
    Queries {
        /// Their shape.
        got: Vec<usize>,
        /// The shape they should have.
        expected: String,
    },
    /// A tensor has another type than the cache.
    #[error("{tensor} is {got}, the cache takes {expected}")]
    DType {
        /// `k`, `v` or `q`.
        tensor: &'static str,
        /// Its type.
        got: &'static str,
        /// The type of the cache.
        expected: &'static str,
    },
    /// A tensor lies on another device than the cache.
    #[error("{tensor} is on {got}, the cache is on {expected}")]
    Device {
        /// `k`, `v` or `q`.
        tensor: &'static str,
        /// Where it lies.
        got: String,
        /// Where the cache lies.
        expected: String,
    },
    /// The sequence would be longer than the cache was made for. Other answers can be chosen: see
    /// [`Overflow`](crate::Overflow).
    #[error("KV cache overflow: a length of {len}, max_seq_len is {max_seq_len}")]
    Overflow {
        /// The length asked for.
        len: usize,
        /// The most the cache was made for.
        max_seq_len: usize,
    },
    /// The pool has too few free blocks: wait, or drop another request's cache.
    #[error("the KV cache's pool is full: {0}")]
    OutOfBlocks(OutOfBlocks),
    /// A circular cache has given back what the last token would see again.
    #[error(transparent)]
    OutOfWindow(#[from] OutOfWindow),
    /// A prefix is sought for a cache that is empty, and holds one sequence.
    #[error("a prefix can be reused by an empty cache of one sequence: this one has {len} tokens, {batch} sequences")]
    NotEmpty {
        /// The tokens it has.
        len: usize,
        /// The sequences it holds.
        batch: usize,
    },
    /// One list of tokens was given to a cache that holds several sequences.
    #[error("the tokens are those of one sequence, and this cache holds a batch of {0}")]
    Sequences(usize),
    /// A layer of the same cache attends or is copied at this moment, and what it reads cannot be changed meanwhile.
    #[error("a layer of this cache is being read, and it cannot be changed meanwhile")]
    Busy,
    /// The pool cannot be made.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A shared block could not be copied.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The tensor library refused.
    #[error(transparent)]
    Candle(candle_core::Error),
}

impl From<OutOfBlocks> for KvError {
    fn from(error: OutOfBlocks) -> Self {
        Self::OutOfBlocks(error)
    }
}

impl From<ReserveError> for KvError {
    fn from(error: ReserveError) -> Self {
        match error {
            ReserveError::OutOfBlocks(error) => Self::OutOfBlocks(error),
            ReserveError::Storage(error) => Self::Storage(error),
        }
    }
}

/// A pool without room stays one, however deep it was found.
impl From<candle_core::Error> for KvError {
    fn from(error: candle_core::Error) -> Self {
        match find_error(&error) {
            Some(ReserveError::OutOfBlocks(full)) => Self::OutOfBlocks(*full),
            _ => Self::Candle(error),
        }
    }
}

/// So that `?` works inside a model. [`KvError::find`] takes it out again.
impl From<KvError> for candle_core::Error {
    fn from(error: KvError) -> Self {
        match error {
            KvError::Candle(error) => error,
            other => wrap_error(other),
        }
    }
}

impl KvError {
    /// Looks for such an error in another one: in a `candle_core::Error` that a model has returned, or in whatever was made
    /// of that, as long as it names its `source`. So a scheduler sees that there was no room.
    ///
    /// ```
    /// use bitnet_kv::{KvError, OutOfBlocks};
    ///
    /// let full = KvError::from(OutOfBlocks { requested: 3, available: 1 });
    /// let from_the_model = candle_core::Error::from(full).context("layer 7");
    /// assert!(matches!(KvError::find(&from_the_model), Some(KvError::OutOfBlocks(full)) if full.requested == 3));
    /// ```
    pub fn find<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e Self> {
        find_error(error)
    }
}

pub(crate) type Result<T> = std::result::Result<T, KvError>;
