//! Statistics of a pool.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Statistics of a pool and of all caches over it, since the pool was made.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct CacheStats {
    /// Tokens that a prefix match found, and that need not be computed; for a [`KVCache`](crate::KVCache), calls of
    /// `get` on a layer with tokens.
    pub hits: u64,
    /// Tokens that were looked for and not matched; for a [`KVCache`](crate::KVCache), calls of `get` on an empty
    /// layer.
    pub misses: u64,
    /// Blocks that were evicted because their memory was needed, and blocks that the windows of circular caches have
    /// freed.
    pub evictions: u64,
    /// Bytes of the blocks in use now. A block that several sequences share counts once.
    pub bytes_in_use: usize,
    /// Bytes of all blocks, in use or not.
    pub bytes_allocated: usize,
    /// How often a pool was added, or replaced by a larger one, because there was no room.
    pub growth_events: u64,
    /// Tokens that were moved to 8-bit storage, of all sequences together.
    pub compressed_tokens: u64,
    /// Bytes of the blocks in use in 8-bit storage now, a part of [`bytes_in_use`](Self::bytes_in_use).
    pub bytes_compressed: usize,
    /// How many more bytes the blocks in use in 8-bit storage now would take in the storage of new tokens.
    pub bytes_saved: usize,
    /// The root mean square error of the keys that were moved to 8-bit storage, relative to the root mean square of the
    /// keys.
    pub key_error: f64,
    /// The same for the values.
    pub value_error: f64,
}

impl CacheStats {
    /// Hits as a fraction of hits and misses, from 0 to 1; 0 when there were neither.
    pub fn hit_rate(&self) -> f64 {
        let all = self.hits + self.misses;
        if all == 0 { 0.0 } else { self.hits as f64 / all as f64 }
    }

    /// The bytes that 8-bit storage saves now, as a fraction of what its tokens would take in the storage of new
    /// tokens: from 0 to 1.
    pub fn saved_fraction(&self) -> f64 {
        let all = self.bytes_saved + self.bytes_compressed;
        if all == 0 { 0.0 } else { self.bytes_saved as f64 / all as f64 }
    }
}

/// The numbers of blocks that a cache uses, shared ones included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlocksInUse {
    /// Blocks in the storage of new tokens.
    pub recent: usize,
    /// Blocks of old tokens in 8-bit storage.
    pub compressed: usize,
}

/// Sums of squares: of the keys and values that were moved to 8-bit storage, and of their rounding errors.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Squares {
    pub(crate) keys: f64,
    pub(crate) key_changes: f64,
    pub(crate) values: f64,
    pub(crate) value_changes: f64,
}

/// The counters that caches increment. The pools count the rest.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    /// Blocks that windows have freed.
    pub(crate) freed_by_window: AtomicU64,
    compressed: Mutex<(u64, Squares)>,
}

impl Counters {
    pub(crate) fn count(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }

    pub(crate) fn compressed(&self, tokens: usize, more: Squares) {
        let mut all = self.compressed.lock().unwrap_or_else(PoisonError::into_inner);
        let (sum, squares) = &mut *all;
        *sum += tokens as u64;
        squares.keys += more.keys;
        squares.key_changes += more.key_changes;
        squares.values += more.values;
        squares.value_changes += more.value_changes;
    }

    /// These counters as statistics. The other fields are 0.
    pub(crate) fn stats(&self) -> CacheStats {
        let (compressed_tokens, squares) = *self.compressed.lock().unwrap_or_else(PoisonError::into_inner);
        let error = |changes: f64, all: f64| if all == 0.0 { 0.0 } else { (changes / all).sqrt() };
        CacheStats {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            evictions: self.freed_by_window.load(Ordering::Relaxed),
            compressed_tokens,
            key_error: error(squares.key_changes, squares.keys),
            value_error: error(squares.value_changes, squares.values),
            ..CacheStats::default()
        }
    }
}
