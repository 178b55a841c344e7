//! A step's sequences laid flat, computed once and read by every layer.

use std::ops::Range;

use block_table::BlockTable;

/// One sequence's part in a step.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    /// Its rows in q, k and v.
    pub(crate) rows: Range<usize>,
    /// The position of its first new token: how many it had before.
    pub(crate) start: usize,
    /// Its blocks in [`Plan::blocks`], enough for all its tokens.
    pub(crate) blocks: Range<usize>,
}

impl Span {
    /// How many tokens it has, the new ones included.
    pub(crate) fn len(&self) -> usize {
        self.start + self.rows.len()
    }
}

/// All sequences of a step, packed one behind the other.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) spans: Vec<Span>,
    /// Block rows of all sequences.
    pub(crate) blocks: Vec<u32>,
    /// For each row the slot its key and value go to.
    pub(crate) slots: Vec<u32>,
}

impl Plan {
    /// Adds `n` new tokens of a sequence, for which `table` has room.
    pub(crate) fn push(&mut self, table: &BlockTable, n: usize) {
        let block_size = table.pool().block_size();
        let start = table.len();
        let rows = self.slots.len()..self.slots.len() + n;
        let first = self.blocks.len();
        self.blocks.extend(table.blocks().iter().take((start + n).div_ceil(block_size)).map(|id| id.index() as u32));
        let blocks = first..self.blocks.len();
        let own = &self.blocks[blocks.clone()];
        self.slots
            .extend((start..start + n).map(|at| own[at / block_size] * block_size as u32 + (at % block_size) as u32));
        self.spans.push(Span { rows, start, blocks });
    }

    /// New tokens of all sequences.
    pub(crate) fn rows(&self) -> usize {
        self.slots.len()
    }
}
