//! What a cache can be told.

use paged_attention::{KvDtype, Salt, Window};

/// What happens when a sequence grows past `max_seq_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Overflow {
    /// [`KvError::Overflow`](crate::KvError::Overflow), and nothing changes.
    #[default]
    Error,
    /// The cache goes on as a ring: a token sees the first `sink_tokens` tokens of its sequence and the last
    /// `max_seq_len - sink_tokens`, itself included. Positions go on counting. Blocks that neither the last token of any layer sees,
    /// nor a later one, are given back when the next pass begins. So a layer can be read at any time, and going back over the
    /// last pass always works.
    ///
    /// A pass over several tokens holds all of them until the next one begins, so the pool needs room for a ring and the
    /// longest pass.
    Circular {
        /// Tokens at the start that are always kept; fewer than `max_seq_len`.
        sink_tokens: usize,
    },
    /// The cache takes more memory, as much as it has, and copies nothing: the sequence goes on in the new segment.
    Grow,
}

impl Overflow {
    /// What a token sees of a cache that is circular.
    pub(crate) fn window(self, max_seq_len: usize) -> Option<Window> {
        match self {
            Self::Circular { sink_tokens } => {
                Some(Window::new(max_seq_len.saturating_sub(sink_tokens)).with_sink_tokens(sink_tokens))
            }
            _ => None,
        }
    }

    /// What the tables of a circular cache keep. A table's window holds what the *next* token sees, and a cache is asked for
    /// what the *last* one sees, which begins one position earlier.
    pub(crate) fn held(self, max_seq_len: usize) -> Option<Window> {
        let window = self.window(max_seq_len)?;
        Some(Window::new(window.tokens().saturating_add(1)).with_sink_tokens(window.sink_tokens()))
    }
}

/// What a request's cache differs in from others of the same pool.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CacheOptions {
    /// Sequences that it holds side by side; 1 unless told. Only a cache of one can reuse prefixes.
    pub batch: usize,
    /// What must match, beside the tokens, for a prefix to be shared: a tenant, an adapter.
    pub salt: Salt,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { batch: 1, salt: Salt::none() }
    }
}

impl CacheOptions {
    /// This many sequences side by side.
    #[must_use]
    pub fn batch(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    /// Prefixes are shared with caches of the same salt only.
    #[must_use]
    pub fn salt(self, salt: Salt) -> Self {
        Self { salt, ..self }
    }
}

/// What a [`KVCache`](crate::KVCache) differs in from one made by [`KVCache::new`](crate::KVCache::new).
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct KVCacheOptions {
    /// What happens past `max_seq_len`.
    pub overflow: Overflow,
    /// Tokens older than the last so many are kept in 8-bit storage.
    pub compress_older_than: Option<usize>,
    /// How new tokens are stored, and given.
    pub dtype: KvDtype,
}

impl KVCacheOptions {
    /// What happens past `max_seq_len`; an error unless told.
    #[must_use]
    pub fn overflow(self, overflow: Overflow) -> Self {
        Self { overflow, ..self }
    }

    /// Keeps tokens that are older than the last `n` in 8-bit storage.
    #[must_use]
    pub fn compress_older_than(self, n: usize) -> Self {
        Self { compress_older_than: Some(n), ..self }
    }

    /// How new tokens are stored, and given; as f32 unless told.
    #[must_use]
    pub fn dtype(self, dtype: KvDtype) -> Self {
        Self { dtype, ..self }
    }
}
