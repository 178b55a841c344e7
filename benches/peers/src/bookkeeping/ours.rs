//! This repository's side.

use anyhow::Result;
use block_pool::{BlockPool, Blocks};
use block_table::BlockTable;

use super::BLOCK_SIZE;

/// A pool, and prompts in it.
#[derive(Debug)]
pub(crate) struct Ours {
    pool: BlockPool,
}

impl Ours {
    /// A pool of `blocks` blocks.
    ///
    /// # Errors
    ///
    /// If that is no size for a pool.
    pub(crate) fn new(blocks: usize) -> Result<Self> {
        Ok(Self { pool: BlockPool::new(blocks, BLOCK_SIZE)? })
    }

    /// `n` blocks, given back when dropped.
    #[inline]
    pub(crate) fn allocate(&self, n: usize) -> Blocks {
        self.pool.take(n).expect("the pool is large enough")
    }

    /// Room for `tokens`, then their blocks published under them. Dropping the table leaves the blocks remembered.
    #[inline]
    pub(crate) fn publish(&self, tokens: &[u32]) -> BlockTable {
        let mut table = BlockTable::new(&self.pool);
        table.reserve(tokens.len()).expect("remembered blocks make way");
        table.commit_tokens(tokens).expect("there is room for them");
        table
    }

    /// The blocks that are known to begin with what `tokens` begins with; at least one token is left over.
    #[inline]
    pub(crate) fn matching(&self, tokens: &[u32]) -> BlockTable {
        let mut table = BlockTable::new(&self.pool);
        table.reuse(tokens);
        table
    }

    /// How many blocks `tokens` would find.
    pub(crate) fn matches(&self, tokens: &[u32]) -> usize {
        self.matching(tokens).blocks().len()
    }

    /// How many blocks nobody holds.
    pub(crate) fn available(&self) -> usize {
        self.pool.available()
    }
}
