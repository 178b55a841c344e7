//! The errors of a cache. Where the host has the same error, the text is the host's.

use paged_attention::{CacheError, OutOfBlocks, OutOfWindow, ReserveError, StorageError, find_error, wrap_error};
use thiserror::Error;

/// Why a call failed. After an error, the cache is unchanged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvError {
    /// The layer does not exist.
    #[error("Layer index {layer} out of bounds: the cache has {layers} layers")]
    Layer {
        /// The index of the layer.
        layer: usize,
        /// How many layers the cache has.
        layers: usize,
    },
    /// A dimension or a length of the cache is 0.
    #[error("{0} must be > 0")]
    Zero(&'static str),
    /// The number of dimensions of a head is 0 or not divisible by 4.
    #[error("head_dim must be > 0 and divisible by 4, got {0}")]
    HeadDim(usize),
    /// Some options of a cache exclude each other.
    #[error("{0}")]
    Options(String),
    /// The keys or values have a wrong shape.
    #[error("KV cache expects {expected}, but received k {k:?} and v {v:?}")]
    Shape {
        /// The shape of the keys.
        k: Vec<usize>,
        /// The shape of the values.
        v: Vec<usize>,
        /// The shapes that the cache takes.
        expected: String,
    },
    /// The number of key heads is not that of the cache.
    #[error("KV cache expects {expected} heads, but received K tensor with {got} heads (k {k:?}, v {v:?})")]
    Heads {
        /// How many heads of keys the cache has.
        expected: usize,
        /// How many heads the keys have.
        got: usize,
        /// The shape of the keys.
        k: Vec<usize>,
        /// The shape of the values.
        v: Vec<usize>,
    },
    /// The number of sequences in the batch is not that of the cache.
    #[error("KV cache has a batch of {expected}, but received one of {got} (k {k:?}, v {v:?})")]
    Batch {
        /// How many sequences the cache has.
        expected: usize,
        /// How many sequences the keys and values have.
        got: usize,
        /// The shape of the keys.
        k: Vec<usize>,
        /// The shape of the values.
        v: Vec<usize>,
    },
    /// The number of tokens does not match the change in length that `seq_len` asks for.
    #[error(
        "{tokens} tokens (k {k:?}, v {v:?}) do not bring a layer of {current} tokens to seq_len {seq_len}: expected \
         {expected}"
    )]
    Length {
        /// How many tokens the keys and values have.
        tokens: usize,
        /// How many tokens the layer has.
        current: usize,
        /// The length that the layer was to have.
        seq_len: usize,
        /// How many tokens are expected.
        expected: String,
        /// The shape of the keys.
        k: Vec<usize>,
        /// The shape of the values.
        v: Vec<usize>,
    },
    /// Keys and values of a whole sequence differ from those that the layer has.
    #[error(
        "token {at} of the {tokens} given differs from that of the layer, which has {current}: clear the cache before \
         another sequence; seq_len is the length of the whole sequence: to append {tokens} tokens, pass {}",
        current + tokens
    )]
    OtherTokens {
        /// The first position that differs.
        at: usize,
        /// How many tokens the keys and values have.
        tokens: usize,
        /// How many tokens the layer has.
        current: usize,
    },
    /// The queries have a wrong shape.
    #[error("q has shape {got:?}, expected {expected}")]
    Queries {
        /// The shape of the queries.
        got: Vec<usize>,
        /// The shape that the cache takes.
        expected: String,
    },
    /// The type of a tensor is not that of the cache.
    #[error("{tensor} is {got}, the cache takes {expected}")]
    DType {
        /// `k`, `v` or `q`.
        tensor: &'static str,
        /// The type of the tensor.
        got: &'static str,
        /// The type of the cache.
        expected: &'static str,
    },
    /// A tensor is on another device than the cache.
    #[error("{tensor} is on {got}, the cache is on {expected}")]
    Device {
        /// `k`, `v` or `q`; `clear` for the device given to [`KVCache::clear`](crate::KVCache::clear).
        tensor: &'static str,
        /// The device of the tensor.
        got: String,
        /// The device of the cache.
        expected: String,
    },
    /// The sequence would be longer than `max_seq_len`. [`Overflow`](crate::Overflow) has the alternatives to this
    /// error.
    #[error("KV cache overflow: length {len} exceeds max_seq_len {max_seq_len}")]
    Overflow {
        /// The length that the sequence would have.
        len: usize,
        /// The longest length that the cache allows.
        max_seq_len: usize,
    },
    /// The pool has too few available blocks: wait, or drop another request's cache.
    #[error("the KV cache's pool is full: {0}")]
    OutOfBlocks(OutOfBlocks),
    /// A circular cache has freed blocks that the last token would see after the truncation.
    #[error(transparent)]
    OutOfWindow(#[from] OutOfWindow),
    /// A prefix can only be matched by an empty cache of one sequence.
    #[error("only an empty cache of one sequence can match a prefix: this one has {len} tokens and a batch of {batch}")]
    NotEmpty {
        /// How many tokens the cache has.
        len: usize,
        /// How many sequences the cache has.
        batch: usize,
    },
    /// A cache of several sequences was given the tokens of one.
    #[error("the tokens are those of one sequence, but the cache has a batch of {0}")]
    Sequences(usize),
    /// A layer of this cache is being attended to or copied, so its blocks cannot be changed at this moment.
    #[error("the cache cannot be changed while one of its layers is being read")]
    Busy,
    /// The pool could not be built.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A shared block could not be copied.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// An error of candle.
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

/// [`OutOfBlocks`] stays [`KvError::OutOfBlocks`], however deep in `error` it is.
impl From<candle_core::Error> for KvError {
    fn from(error: candle_core::Error) -> Self {
        match find_error(&error) {
            Some(ReserveError::OutOfBlocks(full)) => Self::OutOfBlocks(*full),
            _ => Self::Candle(error),
        }
    }
}

/// Makes `?` work inside a model. [`KvError::find`] finds the error again.
impl From<KvError> for candle_core::Error {
    fn from(error: KvError) -> Self {
        match error {
            KvError::Candle(error) => error,
            other => wrap_error(other),
        }
    }
}

impl KvError {
    /// Finds a `KvError` inside another error: in a `candle_core::Error` that a model returned, or in any error whose
    /// chain of `source`s has one. A scheduler uses it to see that the pool was full.
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
