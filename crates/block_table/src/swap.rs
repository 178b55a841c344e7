//! A sequence that waits in host memory.

use block_pool::{BlockPool, PrefixKey, ReserveError, StorageError, SwappedBlocks};

use crate::BlockTable;
use crate::table::Tokens;

/// A sequence whose keys and values wait in host memory while its blocks serve others.
#[derive(Debug, Clone)]
pub struct SwappedTable {
    blocks: SwappedBlocks,
    len: usize,
    gap: usize,
    key: PrefixKey,
    private: bool,
    tail: Option<Tokens>,
}

impl BlockTable {
    /// Copies the sequence's committed tokens to host memory, byte for byte, and gives its blocks back: the table is then
    /// empty. Keep what is returned; it is the sequence.
    ///
    /// # Errors
    ///
    /// [`StorageError`] when the memory cannot be read; the table then has lost nothing but its reservations.
    pub fn swap_out(&mut self) -> Result<SwappedTable, StorageError> {
        self.roll_back();
        let blocks = self.blocks.swap_out()?;
        let tail = self.tail.replace(Tokens::new());
        let (len, gap) = (std::mem::take(&mut self.len), std::mem::take(&mut self.gap));
        let swapped = SwappedTable { blocks, len, gap, key: self.key.clone(), private: self.private, tail };
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

    /// How many blocks it takes to come back.
    pub fn blocks(&self) -> usize {
        self.blocks.blocks()
    }

    /// How many bytes of host memory it takes.
    pub fn bytes(&self) -> usize {
        self.blocks.bytes()
    }

    /// Brings the sequence back, into blocks of the pool it came from.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] when there are too few blocks or the memory cannot be written. No block is taken then, and the
    /// sequence stays here.
    pub fn swap_in(&self) -> Result<BlockTable, ReserveError> {
        let Self { blocks, len, gap, key, private, tail } = self;
        let blocks = blocks.swap_in()?;
        tracing::debug!(tokens = len, blocks = blocks.len(), "swapped in");
        let (key, tail) = (key.clone(), tail.clone());
        Ok(BlockTable { blocks, len: *len, gap: *gap, key, private: *private, tail })
    }

    /// The pool it came from.
    pub fn pool(&self) -> &BlockPool {
        self.blocks.pool()
    }
}
