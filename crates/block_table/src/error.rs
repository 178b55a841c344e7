//! The errors of a table: one type for each case that a caller handles differently.

use thiserror::Error;

/// A commit of more tokens than are reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("asked to commit {committed} tokens, {reserved} are reserved")]
pub struct NotReserved {
    /// How many tokens were to be committed.
    pub committed: usize,
    /// How many tokens were reserved and not committed.
    pub reserved: usize,
}

/// A sequence cannot be truncated to this length: blocks that its next token would see were freed, by its window or by
/// [`free_before`](crate::BlockTable::free_before). Compute the sequence again, or use a larger window.
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
