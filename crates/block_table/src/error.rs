//! The errors of a table that are not those of its blocks.

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
