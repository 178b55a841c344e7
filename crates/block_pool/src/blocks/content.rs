//! The bytes of a sequence's blocks, and what their cached prefix is.

use super::Blocks;
use crate::{PrefixKey, SaltFrom, StorageError};

/// What the cached blocks that a sequence begins with contain.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CachedPrefix {
    /// What must match in addition to the tokens.
    pub key: PrefixKey,
    /// The salts that begin among the tokens.
    pub salts: Vec<SaltFrom>,
    /// The tokens, of full blocks.
    pub tokens: Vec<u32>,
}

impl Blocks {
    /// The longest prefix of the sequence that is cached: its tokens are known, and the blocks have been written. `None`
    /// if the first block is not cached.
    pub fn cached_prefix(&self) -> Option<CachedPrefix> {
        let ledger = self.pool().ledger();
        let known = self.groups().filter_map(|group| ledger.prefix(group, self.group(group)));
        // A group with a window knows only the tokens before those that it has freed.
        known.max_by_key(|known| known.tokens.len())
    }

    /// Whether a sequence of `len` tokens has block number `number` in a group: its next token sees it, or it has sink
    /// tokens, or there is no window.
    pub fn is_kept(&self, group: usize, number: usize, len: usize) -> bool {
        let (span, block_size) = (self.span(group), self.pool().block_size());
        let sinks = span.sink_blocks(block_size);
        number < sinks || number >= sinks + span.freed_blocks(len, block_size)
    }

    /// Appends the bytes of block `number` of a group, all its layers. Returns whether the sequence has that block.
    ///
    /// # Errors
    ///
    /// [`StorageError`] when the memory cannot be read.
    pub fn read(&self, group: usize, number: usize, bytes: &mut Vec<u8>) -> Result<bool, StorageError> {
        let Some(id) = self.block(group, number) else { return Ok(false) };
        self.pool().storage(group).read(id, bytes)?;
        Ok(true)
    }

    /// Writes bytes that [`read`](Self::read) has returned, for a pool of the same geometry, into block `number` of a
    /// group.
    ///
    /// # Errors
    ///
    /// [`StorageError`] when the sequence does not have the block, when others use it, too, when it is cached, or when
    /// the memory cannot be written.
    pub fn write(&mut self, group: usize, number: usize, bytes: &[u8]) -> Result<(), StorageError> {
        let Some(id) = self.block(group, number) else {
            return Err(StorageError::new(format!("there is no block {number} in group {group}")));
        };
        if !self.pool().ledger().is_writable(group, id) {
            return Err(StorageError::new(format!("block {number} of group {group} is shared or cached")));
        }
        self.pool().storage(group).write(id, bytes)
    }
}
