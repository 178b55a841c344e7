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

/// A sequence with a window cannot go back this far: tokens that it would see again have been given back. Compute it
/// anew, or keep more tokens in the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("asked to go back to {len} tokens, which see position {seen}; the window has given back all before {held}")]
pub struct BehindWindow {
    /// The length asked for.
    pub len: usize,
    /// The first position that would be seen.
    pub seen: usize,
    /// The first position that is still held, behind the sinks.
    pub held: usize,
}
