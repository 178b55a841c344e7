//! The options of caches.

use paged_attention::{KvDtype, Salt, Window};

/// What happens when a sequence grows past `max_seq_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Overflow {
    /// [`KvError::Overflow`](crate::KvError::Overflow), and nothing changes.
    #[default]
    Error,
    /// The cache continues as a ring: a token sees the first `sink_tokens` tokens of its sequence and the last
    /// `max_seq_len - sink_tokens` tokens, itself included. Positions keep increasing.
    ///
    /// When the next pass begins, the cache frees the blocks that are visible neither to the last token of any layer
    /// nor to a later token. So a layer can be read at any time, and the last pass can always be truncated.
    ///
    /// All tokens of a pass stay in the pool until the next pass begins, so the pool needs room for the ring and the
    /// longest pass.
    Circular {
        /// How many tokens at the start are always kept: fewer than `max_seq_len`.
        sink_tokens: usize,
    },
    /// The cache allocates as much memory again as it has, and the sequence continues in a new segment. Nothing is
    /// copied.
    Grow,
}

impl Overflow {
    /// What a token sees, if the cache is circular.
    pub(crate) fn window(self, max_seq_len: usize) -> Option<Window> {
        match self {
            Self::Circular { sink_tokens } => {
                Some(Window::new(max_seq_len.saturating_sub(sink_tokens)).with_sink_tokens(sink_tokens))
            }
            _ => None,
        }
    }

    /// The window of a circular cache's tables. A table keeps what its *next* token sees, but a cache must also keep
    /// what its *last* token sees, which begins one position earlier.
    pub(crate) fn kept_window(self, max_seq_len: usize) -> Option<Window> {
        let window = self.window(max_seq_len)?;
        Some(Window::new(window.tokens().saturating_add(1)).with_sink_tokens(window.sink_tokens()))
    }
}

/// The options of one request's cache.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CacheOptions {
    /// How many sequences the cache has: 1 by default. Only a cache of one sequence can match prefixes.
    pub batch: usize,
    /// What must match, in addition to the tokens, for a prefix to be shared, such as a tenant or an adapter.
    pub salt: Salt,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { batch: 1, salt: Salt::none() }
    }
}

impl CacheOptions {
    /// Sets the number of sequences.
    #[must_use]
    pub fn batch(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    /// Sets the salt. Prefixes are shared only with caches of the same salt.
    #[must_use]
    pub fn salt(self, salt: Salt) -> Self {
        Self { salt, ..self }
    }
}

/// The options of a [`KVCache`](crate::KVCache).
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct KVCacheOptions {
    /// What happens past `max_seq_len`: an error by default.
    pub overflow: Overflow,
    /// If set, tokens that are older than this many last tokens are kept in 8-bit storage.
    pub compress_older_than: Option<usize>,
    /// The type in which new tokens are stored and passed in: f32 by default. Tokens stored in 8 bits are passed in as
    /// f32.
    pub dtype: KvDtype,
}

impl KVCacheOptions {
    /// Sets what happens past `max_seq_len`.
    #[must_use]
    pub fn overflow(self, overflow: Overflow) -> Self {
        Self { overflow, ..self }
    }

    /// Keeps tokens that are older than the last `n` tokens in 8-bit storage.
    #[must_use]
    pub fn compress_older_than(self, n: usize) -> Self {
        Self { compress_older_than: Some(n), ..self }
    }

    /// Sets the type of new tokens.
    #[must_use]
    pub fn dtype(self, dtype: KvDtype) -> Self {
        Self { dtype, ..self }
    }
}
