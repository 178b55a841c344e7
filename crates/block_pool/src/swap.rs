//! Blocks that wait in host memory.

use crate::{BlockPool, Blocks, PrefixKey, ReserveError, StorageError};

/// The content of a list of blocks, in host memory, while the blocks serve others.
#[derive(Clone)]
pub struct SwappedBlocks {
    pool: BlockPool,
    epoch: u64,
    blocks: usize,
    bytes: Vec<u8>,
    /// What could be found of it by its tokens.
    prefix: Option<(PrefixKey, Vec<u32>)>,
}

impl Blocks {
    /// Copies the content to host memory, byte for byte, and gives the blocks back. What was stored stays findable, and
    /// is stored again when it comes back.
    ///
    /// # Errors
    ///
    /// [`StorageError`] when the memory cannot be read; the list is then what it was before.
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
    /// The pool whose blocks they were.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// How many blocks it takes to come back.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// How many bytes of host memory it takes.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Takes blocks of the same pool and copies the content into them.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] when there are too few blocks or the memory cannot be written. No block is taken then, and what
    /// is in host memory stays there.
    pub fn swap_in(&self) -> Result<Blocks, ReserveError> {
        let pool = &self.pool;
        let mut blocks = Blocks::successors(pool, self.epoch, self.blocks)?;
        let size = pool.storage().bytes_per_block();
        for (at, &id) in blocks.iter().enumerate() {
            pool.storage().write(id, &self.bytes[at * size..][..size])?;
        }
        if let Some((key, tokens)) = &self.prefix {
            blocks.store(key, 0, &[], tokens);
        }
        Ok(blocks)
    }
}

impl std::fmt::Debug for SwappedBlocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SwappedBlocks").field("blocks", &self.blocks).field("bytes", &self.bytes.len()).finish()
    }
}
