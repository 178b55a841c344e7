//! Blocks swapped out to host memory.

use crate::{BlockPool, Blocks, PrefixKey, ReserveError, StorageError};

/// The content of a list of blocks in host memory, while the blocks themselves are used for other sequences.
#[derive(Clone)]
pub struct SwappedBlocks {
    pool: BlockPool,
    epoch: u64,
    blocks: usize,
    bytes: Vec<u8>,
    /// The key and the tokens of its cached prefix.
    prefix: Option<(PrefixKey, Vec<u32>)>,
}

impl Blocks {
    /// Copies the content to host memory, byte for byte, and frees the blocks. The cached ones stay cached until they
    /// are evicted; [`SwappedBlocks::swap_in`] caches the same prefix again.
    ///
    /// # Errors
    ///
    /// [`StorageError`] when the memory cannot be read; then the list is unchanged.
    pub fn swap_out(&mut self) -> Result<SwappedBlocks, StorageError> {
        let pool = self.pool().clone();
        let mut bytes = Vec::new();
        for &id in self.iter() {
            pool.storage().read(id, &mut bytes)?;
        }
        let prefix = pool.ledger().prefix(self);
        let swapped = SwappedBlocks { epoch: self.epoch(), blocks: self.len(), bytes, prefix, pool };
        self.truncate(0);
        Ok(swapped)
    }
}

impl SwappedBlocks {
    /// The pool of the blocks.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// How many blocks [`swap_in`](Self::swap_in) allocates.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// How many bytes of host memory the content takes.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Allocates blocks of the same pool and copies the content into them.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] when too few blocks are available or the memory cannot be written. Then no block is allocated,
    /// and the content stays in host memory.
    pub fn swap_in(&self) -> Result<Blocks, ReserveError> {
        let pool = &self.pool;
        let mut blocks = Blocks::successors(pool, self.epoch, self.blocks)?;
        let size = pool.storage().bytes_per_block();
        for (at, &id) in blocks.iter().enumerate() {
            pool.storage().write(id, &self.bytes[at * size..][..size])?;
        }
        if let Some((key, tokens)) = &self.prefix {
            // They were allocated here, so they are not cached.
            let _ = blocks.cache(key, 0, &[], tokens);
        }
        Ok(blocks)
    }
}

impl std::fmt::Debug for SwappedBlocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SwappedBlocks").field("blocks", &self.blocks).field("bytes", &self.bytes.len()).finish()
    }
}
