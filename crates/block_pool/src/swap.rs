//! Blocks swapped out to host memory.

use crate::{BlockPool, Blocks, CachedPrefix, ReserveError, SaltFrom, StorageError, Window};

/// The content of a sequence's blocks in host memory, while the blocks themselves are used for other sequences.
#[derive(Clone)]
pub struct SwappedBlocks {
    pool: BlockPool,
    window: Option<Window>,
    salts: Vec<SaltFrom>,
    epoch: u64,
    /// For each group, how many blocks there are, and how many were freed before.
    lists: Vec<(usize, usize)>,
    /// The content of the blocks, group by group.
    bytes: Vec<u8>,
    /// Its cached prefix. After going back into a block, the salts of the block are still in here.
    prefix: Option<CachedPrefix>,
}

impl Blocks {
    /// Copies the content to host memory, byte for byte, and frees the blocks. The cached ones stay cached until they
    /// are evicted; [`SwappedBlocks::swap_in`] caches the same prefix again.
    ///
    /// # Errors
    ///
    /// [`StorageError`] when the memory cannot be read; then nothing changes.
    pub fn swap_out(&mut self) -> Result<SwappedBlocks, StorageError> {
        let pool = self.pool().clone();
        let (mut bytes, mut lists) = (Vec::new(), Vec::new());
        for group in 0..pool.groups().len() {
            let ids = self.group(group);
            for &id in ids {
                pool.storage(group).read(id, &mut bytes)?;
            }
            lists.push((ids.len(), self.freed(group).len()));
        }
        let prefix = self.cached_prefix();
        let (window, salts, epoch) = (self.window(), self.salts().to_vec(), self.epoch());
        let swapped = SwappedBlocks { window, salts, epoch, lists, bytes, prefix, pool };
        *self = Blocks::empty(&swapped.pool).with_window(swapped.window);
        Ok(swapped)
    }
}

impl SwappedBlocks {
    /// The pool of the blocks.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// How many available units [`swap_in`](Self::swap_in) takes.
    pub fn units(&self) -> usize {
        self.lists.iter().zip(self.pool.groups()).map(|((blocks, _), group)| blocks * group.units).sum()
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
        let mut blocks = Blocks::successors(pool, self.window, self.epoch, &self.lists)?;
        let mut bytes = &self.bytes[..];
        for group in 0..pool.groups().len() {
            let size = pool.storage(group).bytes_per_block();
            for &id in blocks.group(group) {
                let (block, rest) = bytes.split_at(size);
                pool.storage(group).write(id, block)?;
                bytes = rest;
            }
        }
        if let Some(CachedPrefix { key, salts, tokens }) = &self.prefix {
            blocks = blocks.with_salts(salts);
            // They were allocated here, so they are not cached.
            let _ = blocks.cache(key, 0, &[], tokens);
        }
        blocks.remove_salts_from(0);
        Ok(blocks.with_salts(&self.salts))
    }
}

impl std::fmt::Debug for SwappedBlocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SwappedBlocks").field("units", &self.units()).field("bytes", &self.bytes.len()).finish()
    }
}
