//! What is done with the sequences.

pub(crate) mod chunks;
pub(crate) mod drafts;
pub(crate) mod forks;
pub(crate) mod joins;
pub(crate) mod prefixes;
pub(crate) mod small_pools;
