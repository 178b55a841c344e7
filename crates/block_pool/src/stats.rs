//! Numbers that tell whether prefix reuse pays.

/// What a pool has done since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Stats {
    /// How often a prefix was sought.
    pub queries: u64,
    /// Tokens that were sought.
    pub queried_tokens: u64,
    /// Tokens that were found, and so need not be computed.
    pub hit_tokens: u64,
    /// Remembered blocks that gave way because their memory was needed.
    pub evictions: u64,
    /// Blocks that were copied because somebody was about to write to one that others read.
    pub copies: u64,
}

impl Stats {
    /// Found of sought tokens, from 0 to 1; 0 when nothing was sought.
    pub fn hit_rate(&self) -> f64 {
        if self.queried_tokens == 0 { 0.0 } else { self.hit_tokens as f64 / self.queried_tokens as f64 }
    }
}

/// What a look-up has found: see [`BlockPool::find`](crate::BlockPool::find) and [`Blocks::find`](crate::Blocks::find).
/// Nothing was taken or counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Found {
    /// How many tokens [`Blocks::reuse`](crate::Blocks::reuse) would gain at this moment.
    pub tokens: usize,
    /// Blocks for them that somebody holds: sharing them takes nothing from the pool.
    pub held: usize,
    /// Blocks for them that nobody holds: using them takes as much from the pool as new blocks would, and spares the
    /// computation.
    pub remembered: usize,
    /// By how many the pool's [available](crate::BlockPool::available) blocks become fewer when these are used and there are
    /// slots for the rest: the remembered ones, new ones, and the copy of a last block that others hold. With fewer
    /// available there is not enough room, with as many there is.
    pub blocks: usize,
}
