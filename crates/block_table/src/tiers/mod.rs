//! A sequence and the tiers below the pool: what it stores there, and what it starts with from there.
//!
//! Loading has two halves. A [`PrefixReader`] reads blocks into host memory: it takes as long as the tier takes, needs no
//! available block, and can run in any thread while the sequence exists or not. [`BlockTable::insert`] copies them into
//! the pool between two steps.
//!
//! - this file: what a table does with a tier;
//! - `reader`: reading a prefix within limits, in several threads;
//! - `fetched`: what was read;
//! - `walk`: the place of a block in a tier.

mod fetched;
mod reader;
mod walk;

use block_pool::{ReserveError, StorageError, Tier};

use crate::table::Tokens;
use crate::{BlockTable, NotReserved};

pub use fetched::FetchedPrefix;
pub use reader::{FetchLimits, PrefixReader};
use walk::salts_of;

/// How many blocks of a prefix a tier got.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredPrefix {
    /// Blocks that it did not have.
    pub new: usize,
    /// Blocks that it had.
    pub already: usize,
}

impl BlockTable {
    /// A reader of what a tier has of `tokens`, which are all tokens of the sequence, after those that the table has. Call
    /// it after [`match_prefix`](Self::match_prefix). As there, the last of `tokens` is never found.
    pub fn prefix_reader(&self, tokens: &[u32]) -> PrefixReader {
        PrefixReader::new(self, tokens)
    }

    /// How many of `tokens`, which are all tokens of the sequence, it would have with what a tier seems to have; 0 if that
    /// is nothing. Nothing is read.
    pub fn lookup_tier(&self, tier: &dyn Tier, tokens: &[u32]) -> usize {
        self.prefix_reader(tokens).lookup(tier)
    }

    /// Reads from a tier the blocks that continue this sequence: the first [piece](PrefixReader::read) of a
    /// [reader](Self::prefix_reader).
    pub fn fetch(&self, tier: &dyn Tier, tokens: &[u32], limits: &FetchLimits) -> FetchedPrefix {
        self.prefix_reader(tokens).read(tier, limits)
    }

    /// Adds fetched blocks to the table: they become cached blocks of the pool, as if they had been computed. Returns how
    /// many tokens the sequence has gained; 0 if it or the pool's cache is not as it was when they were fetched, or if
    /// nothing was fetched. A block that had been matched in part is replaced.
    ///
    /// The blocks of all tokens that are added are allocated at once, and windows free theirs after that.
    ///
    /// # Errors
    ///
    /// [`ReserveError::OutOfBlocks`] when too few blocks are available; the table may have lost what it had matched of
    /// its last block. [`ReserveError::Storage`] when the pool's memory cannot be written; the table is empty then.
    pub fn insert(&mut self, fetched: &FetchedPrefix) -> Result<usize, ReserveError> {
        let block_size = self.pool().block_size();
        let (before, start) = (self.len, fetched.start * block_size);
        // If a window has passed what the beginning of the last block sees, it is computed.
        if !self.continues_with(fetched) || self.truncate(start).is_err() {
            return Ok(0);
        }
        self.reserve(fetched.len() - start)?;
        // The first block has the epoch of this moment, and the cache may have been reset just now.
        if self.pool().epoch() != fetched.epoch {
            self.roll_back();
            return Ok(0);
        }
        // What windows have passed at the new length was not fetched, and must not be cached.
        let unless_written = Emptied(self);
        unless_written.0.blocks.free_invisible(fetched.len());
        for &(group, number, at) in &fetched.blocks {
            let bytes = &fetched.bytes[at..at + fetched.pool.bytes_per_block(group)];
            unless_written.0.blocks.write(group, number, bytes)?;
        }
        std::mem::forget(unless_written);
        match self.commit_tokens(&fetched.tokens[start..]) {
            Ok(()) => Ok(self.len.saturating_sub(before)),
            Err(NotReserved { .. }) => Ok(0),
        }
    }

    /// Whether the table is what the blocks were fetched for.
    fn continues_with(&self, fetched: &FetchedPrefix) -> bool {
        let FetchedPrefix { pool, epoch, key, salts, tokens, start, blocks, .. } = fetched;
        let block_size = pool.block_size();
        let is_same = pool.is_same(self.pool()) && *epoch == pool.epoch() && *key == self.key && salts == self.salts();
        if blocks.is_empty() || self.private || !is_same || self.len / block_size != *start {
            return false;
        }
        // Nothing can be cached after blocks whose tokens are not known.
        self.blocks.continues(key, *start, &tokens[..start * block_size])
    }

    /// Stores the full blocks of this sequence in a tier, as far as their tokens are known and they are cached. In a group
    /// with a window, those are stored that the window has not passed.
    ///
    /// # Errors
    ///
    /// [`StorageError`] when the pool's memory cannot be read or the tier cannot store a block. What was stored before
    /// stays there.
    pub fn store_prefix(&self, tier: &dyn Tier) -> Result<StoredPrefix, StorageError> {
        let mut stored = StoredPrefix::default();
        let Some(prefix) = self.blocks.cached_prefix() else { return Ok(stored) };
        let block_size = self.pool().block_size();
        let mut cursor = tier.cursor(&prefix.key);
        let mut bytes = Vec::new();
        for (number, tokens) in prefix.tokens.chunks_exact(block_size).enumerate() {
            cursor.advance(tokens, salts_of(&prefix.salts, number, block_size));
            for group in 0..self.pool().groups().len() {
                if self.blocks.block(group, number).is_some() && cursor.contains(group) {
                    stored.already += 1;
                    continue;
                }
                bytes.clear();
                if self.blocks.read(group, number, &mut bytes)? {
                    match cursor.store(group, &bytes)? {
                        true => stored.new += 1,
                        false => stored.already += 1,
                    }
                }
            }
        }
        Ok(stored)
    }
}

/// A table that becomes empty when this is dropped: windows have freed blocks for tokens that it does not have.
struct Emptied<'a>(&'a mut BlockTable);

impl Drop for Emptied<'_> {
    fn drop(&mut self) {
        let BlockTable { blocks, len, tail, .. } = &mut *self.0;
        (*len, *tail) = (0, Some(Tokens::new()));
        // The first token sees nothing that was freed, so it cannot fail.
        let _ = blocks.go_back(0);
    }
}
