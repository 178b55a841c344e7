//! A sequence in host memory.

use block_pool::{BlockPool, PrefixKey, ReserveError, StorageError, SwappedBlocks};

use crate::BlockTable;
use crate::table::Tokens;

/// A sequence whose keys and values are in host memory; it uses no blocks of the pool.
#[derive(Debug, Clone)]
pub struct SwappedTable {
    blocks: SwappedBlocks,
    len: usize,
    key: PrefixKey,
    private: bool,
    tail: Option<Tokens>,
}

impl BlockTable {
    /// Copies the keys and values of the committed tokens to host memory, byte for byte, and frees the blocks. The
    /// table is then empty, without salts [from a position on](Self::salt_from), and the returned value is the sequence.
    ///
    /// # Errors
    ///
    /// [`StorageError`] when the pool's memory cannot be read. The table then keeps its tokens; only its reserved slots
    /// are rolled back.
    pub fn swap_out(&mut self) -> Result<SwappedTable, StorageError> {
        self.roll_back();
        let blocks = self.blocks.swap_out()?;
        let tail = self.tail.replace(Tokens::new());
        let len = std::mem::take(&mut self.len);
        let swapped = SwappedTable { blocks, len, key: self.key.clone(), private: self.private, tail };
        // Last: this calls the host's code, which may panic.
        tracing::debug!(tokens = len, bytes = swapped.bytes(), "swapped out");
        Ok(swapped)
    }
}

impl SwappedTable {
    /// How many tokens the sequence has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the sequence has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many available blocks [`swap_in`](Self::swap_in) takes; units, if the pool has several groups.
    pub fn blocks(&self) -> usize {
        self.blocks.units()
    }

    /// How many bytes of host memory the sequence takes.
    pub fn bytes(&self) -> usize {
        self.blocks.bytes()
    }

    /// Copies the sequence back into blocks of the pool it came from.
    ///
    /// # Errors
    ///
    /// [`ReserveError::OutOfBlocks`] when too few blocks are available, [`ReserveError::Storage`] when the pool's
    /// memory cannot be written. No block is allocated then. `self` keeps the sequence in any case.
    pub fn swap_in(&self) -> Result<BlockTable, ReserveError> {
        let Self { blocks, len, key, private, tail } = self;
        let blocks = blocks.swap_in()?;
        tracing::debug!(tokens = len, blocks = blocks.len(), "swapped in");
        let (key, tail) = (key.clone(), tail.clone());
        Ok(BlockTable { blocks, len: *len, key, private: *private, tail })
    }

    /// The pool that the sequence came from.
    pub fn pool(&self) -> &BlockPool {
        self.blocks.pool()
    }
}
