//! Consecutive tokens of a cache's sequences, in one pool.

use std::ops::Range;

use paged_attention::{BlockTable, KvCache, OutOfBlocks, ReserveError, TableOptions};

use crate::error::Result;
use crate::stores::Stores;

/// How often a pool that had room a moment ago may turn out to be full: others take blocks meanwhile.
const TRIES: usize = 16;

#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) cache: KvCache,
    /// One for each sequence, all with as many tokens. Committed are the tokens that all layers have.
    pub(crate) tables: Vec<BlockTable>,
    /// Which position of the sequence a table's first one is.
    pub(crate) start: usize,
    /// Whether it holds what has been moved to 8-bit storage.
    pub(crate) old: bool,
}

impl Part {
    /// A part with slots for `tokens` tokens of each sequence from position `start` on, in a pool of `stores` that has room.
    pub(crate) fn new(
        stores: &Stores,
        options: &TableOptions,
        batch: usize,
        start: usize,
        tokens: usize,
        old: bool,
    ) -> Result<Self> {
        let block_size = stores.block_size();
        let blocks = batch.saturating_mul(tokens.div_ceil(block_size));
        let mut tries = 0;
        loop {
            let cache = stores.with_room(blocks)?;
            let tables = (0..batch).map(|_| cache.table_with(options)).collect();
            let mut part = Self { cache, tables, start, old };
            match part.reserve(start + tokens) {
                Err(ReserveError::OutOfBlocks(_)) if tries < TRIES => tries += 1,
                other => return other.map(|()| part).map_err(Into::into),
            }
        }
    }

    /// The position of the first token that it holds, or could; with a window 0, whatever has been left behind.
    pub(crate) fn first(&self) -> usize {
        let given_back = |table: &BlockTable| match table.window() {
            Some(_) => 0,
            None => table.gap().1 * table.pool().block_size(),
        };
        self.start + self.tables.first().map_or(0, given_back)
    }

    /// The position behind the last token that all layers have.
    pub(crate) fn committed(&self) -> usize {
        self.start + self.tables.first().map_or(0, BlockTable::len)
    }

    /// The first position without a slot.
    pub(crate) fn capacity(&self) -> usize {
        self.start + self.tables.first().map_or(0, BlockTable::capacity)
    }

    /// Makes slots up to position `end`, in all tables or none.
    pub(crate) fn reserve(&mut self, end: usize) -> std::result::Result<(), ReserveError> {
        let (before, committed) = (self.capacity() - self.start, self.committed());
        let wanted = end.saturating_sub(committed);
        for at in 0..self.tables.len() {
            if let Err(error) = self.tables[at].reserve(wanted) {
                self.tables[..at].iter_mut().for_each(|table| table.shrink_to(before));
                return Err(self.for_all_tables(error, wanted));
            }
        }
        Ok(())
    }

    /// A full pool, seen by all sequences together.
    fn for_all_tables(&self, error: ReserveError, wanted: usize) -> ReserveError {
        match error {
            ReserveError::OutOfBlocks(full) if self.tables.len() > 1 => {
                let table = &self.tables[0];
                let growth = table
                    .pool()
                    .blocks_for(table.len() + wanted)
                    .saturating_sub((self.capacity() - self.start) / table.pool().block_size());
                let requested = growth.max(full.requested) * self.tables.len();
                ReserveError::OutOfBlocks(OutOfBlocks { requested, available: table.pool().available() })
            }
            other => other,
        }
    }

    /// Keeps the positions before `end`.
    pub(crate) fn truncate(&mut self, end: usize) -> Result<()> {
        let end = end - self.start;
        for table in &mut self.tables {
            if end < table.len() {
                table.truncate(end)?;
            } else {
                table.shrink_to(end);
            }
        }
        Ok(())
    }

    /// The positions of part `at` of those that follow each other: up to where the next one begins, or as far as it has slots.
    pub(crate) fn bounds(parts: &[Self], at: usize) -> Range<usize> {
        let part = &parts[at];
        part.first()..parts.get(at + 1).map_or_else(|| part.capacity(), Self::first)
    }

    /// Blocks that its tables hold.
    pub(crate) fn blocks(&self) -> usize {
        self.tables.iter().map(|table| table.blocks().len()).sum()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.blocks() * self.cache.bytes_per_block()
    }
}
