//! What a tier is opened with.

use std::time::Duration;

use block_pool::BlockPool;

use crate::OpenError;

/// The sizes of the blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Tokens in a block.
    pub block_size: usize,
    /// The bytes of a block of each group of layers. Every slot has room for the largest.
    pub bytes: Vec<usize>,
}

impl Geometry {
    /// That of a pool.
    pub fn of(pool: &BlockPool) -> Self {
        let groups = 0..pool.groups().len();
        Self { block_size: pool.block_size(), bytes: groups.map(|group| pool.bytes_per_block(group)).collect() }
    }

    /// The bytes of the largest block, if the geometry makes sense.
    pub(crate) fn check(&self) -> Result<usize, OpenError> {
        let largest = self.bytes.iter().copied().max().unwrap_or(0);
        let is_small = |n: usize| n <= u32::MAX as usize;
        // Far below what positions in a file could not hold.
        match self.block_size > 0 && !self.bytes.is_empty() && is_small(self.block_size) && is_small(largest) {
            true => Ok(largest),
            false => {
                let groups = self.bytes.len();
                Err(OpenError::Geometry { block_size: self.block_size, groups, bytes: largest })
            }
        }
    }
}

/// The limits and the secret of a tier.
#[derive(Clone)]
pub struct Options {
    pub(crate) max_bytes: u64,
    pub(crate) max_age: Option<Duration>,
    pub(crate) secret: Option<Vec<u8>>,
    pub(crate) direct_reads: bool,
}

impl Options {
    /// A file of at most this many bytes. Where it is longer already, it is cut.
    pub fn new(max_bytes: u64) -> Self {
        Self { max_bytes, max_age: None, secret: None, direct_reads: false }
    }

    pub(crate) fn check(&self) -> Result<(), OpenError> {
        match &self.secret {
            Some(secret) if secret.is_empty() => Err(OpenError::EmptySecret),
            _ => Ok(()),
        }
    }

    /// Blocks are not found any more when they were stored longer ago than this.
    #[must_use]
    pub fn max_age(self, age: Duration) -> Self {
        Self { max_age: Some(age), ..self }
    }

    /// Derives all keys from these bytes, which are not stored: without them nothing of the file is found. They should
    /// have 32 random bytes, or as much that cannot be guessed.
    #[must_use]
    pub fn secret(self, secret: &[u8]) -> Self {
        Self { secret: Some(secret.to_vec()), ..self }
    }

    /// Whether blocks are read past the system's cache, where the system can do that (Linux, on most file systems): for a
    /// file that is much larger than the memory.
    #[must_use]
    pub fn direct_reads(self, direct: bool) -> Self {
        Self { direct_reads: direct, ..self }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { max_bytes, max_age, secret, direct_reads } = self;
        let mut out = f.debug_struct("Options");
        out.field("max_bytes", max_bytes).field("max_age", max_age).field("direct_reads", direct_reads);
        // Not the bytes: what is printed for debugging ends in logs.
        out.field("secret", &secret.as_ref().map(|_| "...")).finish()
    }
}
