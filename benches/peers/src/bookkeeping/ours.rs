//! Our pool and tables.

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
    /// If the pool cannot have this size.
    pub(crate) fn new(blocks: usize) -> Result<Self> {
        Ok(Self { pool: BlockPool::new(blocks, BLOCK_SIZE)? })
    }

    /// Allocates `n` blocks, which are freed on drop.
    #[inline]
    pub(crate) fn allocate(&self, n: usize) -> Blocks {
        self.pool.allocate(n).expect("the pool is large enough")
    }

    /// Reserves blocks for `tokens` and commits them. After the table is dropped the full blocks stay cached.
    #[inline]
    pub(crate) fn publish(&self, tokens: &[u32]) -> BlockTable {
        let mut table = BlockTable::new(&self.pool);
        table.reserve(tokens.len()).expect("cached blocks are evicted");
        table.commit_tokens(tokens).expect("there is room for them");
        table
    }

    /// A table with the cached blocks of the longest prefix of `tokens` that leaves at least one token to compute.
    #[inline]
    pub(crate) fn matching(&self, tokens: &[u32]) -> BlockTable {
        let mut table = BlockTable::new(&self.pool);
        table.match_prefix(tokens);
        table
    }

    /// The number of blocks that `tokens` matches.
    pub(crate) fn matches(&self, tokens: &[u32]) -> usize {
        self.matching(tokens).blocks().len()
    }

    /// The number of blocks that are free or evictable.
    pub(crate) fn available(&self) -> usize {
        self.pool.available()
    }
}
