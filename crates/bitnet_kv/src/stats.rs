//! What a pool has done, and what it holds.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Numbers of a pool and of all caches over it, since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct CacheStats {
    /// Tokens that a prefix search found, and that need not be computed; for a [`KVCache`](crate::KVCache), calls of `get`
    /// that found tokens.
    pub hits: u64,
    /// Tokens that were sought and not found; for a [`KVCache`](crate::KVCache), calls of `get` on an empty layer.
    pub misses: u64,
    /// Blocks that gave way: remembered prefixes whose memory was needed, and what circular windows have left behind.
    pub evictions: u64,
    /// Bytes of the blocks that somebody holds now. A block that several sequences share counts once.
    pub bytes_held: usize,
    /// Bytes of all blocks.
    pub bytes_reserved: usize,
    /// How often a pool was added because there was no room.
    pub growth_events: u64,
    /// Tokens that were moved to 8-bit storage, all sequences together.
    pub compressed_tokens: u64,
    /// Bytes of the blocks held in 8-bit storage now, of [`bytes_held`](Self::bytes_held).
    pub bytes_compressed: usize,
    /// Bytes that the blocks held in 8-bit storage now would take more in the storage of new tokens.
    pub bytes_saved: usize,
    /// The error of the keys that were moved, root mean square, relative to that of the keys: what 8-bit storage costs.
    pub key_error: f64,
    /// The same of the values.
    pub value_error: f64,
}

impl CacheStats {
    /// Hits of all, from 0 to 1; 0 when nothing was sought.
    pub fn hit_rate(&self) -> f64 {
        let all = self.hits + self.misses;
        if all == 0 { 0.0 } else { self.hits as f64 / all as f64 }
    }

    /// What 8-bit storage saves now, as a part of what its tokens would take otherwise: from 0 to 1.
    pub fn saved_part(&self) -> f64 {
        let all = self.bytes_saved + self.bytes_compressed;
        if all == 0 { 0.0 } else { self.bytes_saved as f64 / all as f64 }
    }
}

/// Sums of squares: of what was stored, and of what storing it in 8 bits has changed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Squares {
    pub(crate) keys: f64,
    pub(crate) key_changes: f64,
    pub(crate) values: f64,
    pub(crate) value_changes: f64,
}

/// What is counted where it happens.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) left_behind: AtomicU64,
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

    /// What was counted; the rest is the pools' business.
    pub(crate) fn stats(&self) -> CacheStats {
        let (compressed_tokens, squares) = *self.compressed.lock().unwrap_or_else(PoisonError::into_inner);
        let error = |changes: f64, all: f64| if all == 0.0 { 0.0 } else { (changes / all).sqrt() };
        CacheStats {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            evictions: self.left_behind.load(Ordering::Relaxed),
            compressed_tokens,
            key_error: error(squares.key_changes, squares.keys),
            value_error: error(squares.value_changes, squares.values),
            ..CacheStats::default()
        }
    }
}
