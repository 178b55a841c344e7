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

/// Salts from a position on cannot be added or removed, because its token is a part of the sequence already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the salts from position {position} on cannot change: {len} tokens are committed or matched")]
pub struct SaltTooLate {
    /// The position given.
    pub position: usize,
    /// How many tokens the sequence has: the first position from which salts can change.
    pub len: usize,
}
