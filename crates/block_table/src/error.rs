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

/// A salt from a position on whose token is a part of the sequence already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a salt from position {position} on comes too late: {len} tokens are committed or matched")]
pub struct SaltTooLate {
    /// The position from which the salt was to hold.
    pub position: usize,
    /// How many tokens the sequence has: the first position from which a salt can hold.
    pub len: usize,
}
