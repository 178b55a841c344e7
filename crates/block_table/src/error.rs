//! What can go wrong with a table, one type for each thing that a caller acts on differently.

use thiserror::Error;

/// More tokens were to be committed than were reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("asked to commit {committed} tokens, {reserved} are reserved")]
pub struct NotReserved {
    /// The tokens to be committed.
    pub committed: usize,
    /// The tokens there was room for.
    pub reserved: usize,
}

/// A sequence cannot go back this far: tokens that it would see again have been given back, by its window or by
/// [`release_before`](crate::BlockTable::release_before). Compute it anew, or keep more tokens in the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("asked to go back to {len} tokens, which see position {seen}; all before {held} has been given back")]
pub struct BehindWindow {
    /// The length asked for.
    pub len: usize,
    /// The first position that would be seen.
    pub seen: usize,
    /// The first position that is still held, behind the sinks.
    pub held: usize,
}
