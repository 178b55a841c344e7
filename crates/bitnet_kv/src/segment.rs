//! A segment: consecutive tokens of a cache's sequences, in one pool.

use std::ops::Range;

use candle_core::Tensor;
use paged_attention::{BlockTable, KvCache, OutOfBlocks, ReserveError, TableOptions};

use crate::error::Result;
use crate::stores::Stores;

/// How often to try again when a pool that had room is full after all, because other caches allocated blocks meanwhile.
const TRIES: usize = 16;

/// A segment with its own tables; [`paged_attention::Segment`] borrows them.
#[derive(Debug)]
pub(crate) struct OwnedSegment {
    pub(crate) cache: KvCache,
    /// One table for each sequence, all of the same length. The tokens that all layers have are committed.
    pub(crate) tables: Vec<BlockTable>,
    /// The position in the sequence of a table's position 0.
    pub(crate) start: usize,
    /// Whether its tokens were moved to 8-bit storage.
    pub(crate) old: bool,
}

impl OwnedSegment {
    /// A segment with slots for `tokens` tokens of each sequence from position `start` on, in a pool of `stores` that
    /// has room for them.
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
            let mut segment = Self { cache, tables, start, old };
            match segment.reserve(start + tokens) {
                Err(ReserveError::OutOfBlocks(_)) if tries < TRIES => tries += 1,
                other => return other.map(|()| segment).map_err(Into::into),
            }
        }
    }

    /// The keys and values at these positions of each table, each `(batch * tokens, kv_heads, head_dim)`.
    pub(crate) fn read(&self, layer: usize, in_table: Range<usize>) -> Result<(Tensor, Tensor)> {
        let (mut keys, mut values) = (vec![], vec![]);
        for table in &self.tables {
            let (k, v) = self.cache.read(layer, table, in_table.clone())?;
            keys.push(k);
            values.push(v);
        }
        Ok((Tensor::cat(&keys, 0)?, Tensor::cat(&values, 0)?))
    }

    /// The position of the first token that the segment has, or can have. With a window it is `start`, whatever the
    /// window has freed.
    pub(crate) fn first(&self) -> usize {
        let freed = |table: &BlockTable| match table.window() {
            Some(_) => 0,
            None => table.freed_blocks().len() * table.pool().block_size(),
        };
        self.start + self.tables.first().map_or(0, freed)
    }

    /// The position after the last committed token.
    pub(crate) fn committed(&self) -> usize {
        self.start + self.tables.first().map_or(0, BlockTable::len)
    }

    /// The first position without a slot.
    pub(crate) fn capacity(&self) -> usize {
        self.start + self.tables.first().map_or(0, BlockTable::capacity)
    }

    /// Makes slots up to position `end`, in all tables or in none.
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

    /// The error for one table, with the number of blocks that all tables together need.
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

    /// Keeps the positions before `end`, and frees the blocks after them.
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

    /// The positions of segment `at` of consecutive segments: up to the first position of the next segment, or, in the
    /// last segment, up to its capacity.
    pub(crate) fn bounds(segments: &[Self], at: usize) -> Range<usize> {
        let segment = &segments[at];
        segment.first()..segments.get(at + 1).map_or_else(|| segment.capacity(), Self::first)
    }

    /// How many blocks its tables have, shared ones counted for each table.
    pub(crate) fn blocks(&self) -> usize {
        self.tables.iter().map(|table| table.blocks().len()).sum()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.blocks() * self.cache.bytes_per_block()
    }
}
