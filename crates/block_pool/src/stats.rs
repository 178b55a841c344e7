//! Counters that show whether prefix caching pays.

/// What a pool has done since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Stats {
    /// How often [`Blocks::match_prefix`](crate::Blocks::match_prefix) searched for a cached prefix. Look-ups do not
    /// count.
    pub queries: u64,
    /// Tokens of these searches.
    pub queried_tokens: u64,
    /// Tokens that matched, and so need not be computed.
    pub hit_tokens: u64,
    /// Cached blocks that were evicted because their memory was needed.
    pub evictions: u64,
    /// Blocks that were copied before a write because other sequences used them or they were cached.
    pub copies: u64,
}

impl Stats {
    /// Matched tokens as a fraction of the queried ones, from 0 to 1; 0 when nothing was queried.
    pub fn hit_rate(&self) -> f64 {
        if self.queried_tokens == 0 { 0.0 } else { self.hit_tokens as f64 / self.queried_tokens as f64 }
    }
}

/// The result of a look-up: see [`BlockPool::lookup_prefix`](crate::BlockPool::lookup_prefix) and
/// [`Blocks::lookup_prefix`](crate::Blocks::lookup_prefix). No block was used, and the statistics did not change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrefixMatch {
    /// How many tokens [`Blocks::match_prefix`](crate::Blocks::match_prefix) would match at this moment.
    pub tokens: usize,
    /// How many of the matched blocks, of all groups together, are in use already: using them takes no available block.
    pub in_use: usize,
    /// How many of the matched blocks, of all groups together, are evictable: using them takes as many available blocks as new ones would, but
    /// saves the computation.
    pub evictable: usize,
    /// By how much the number of [available](crate::BlockPool::available) blocks (with several groups, units) falls when the match is used and slots
    /// for the remaining tokens are reserved: the evictable blocks, the new ones, and the copy of a last block that
    /// other sequences use. The request fits if at least this many are available.
    pub blocks: usize,
}
