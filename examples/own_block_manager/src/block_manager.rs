//! A block manager as vLLM's first one: a list of free blocks, and a table of blocks for each sequence.

use std::collections::HashMap;

/// Which blocks are free, and which sequence has the others.
#[derive(Debug)]
pub(crate) struct BlockManager {
    block_size: usize,
    free: Vec<u32>,
    /// By the number of the sequence: its blocks in the order of its positions.
    tables: HashMap<usize, Vec<u32>>,
}

impl BlockManager {
    /// A manager of `blocks` free blocks of `block_size` tokens.
    pub(crate) fn new(blocks: u32, block_size: usize) -> Self {
        Self { block_size, free: (0..blocks).rev().collect(), tables: HashMap::new() }
    }

    /// How many blocks are free.
    pub(crate) fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Gives a sequence blocks for `tokens` tokens in all. Returns `false`, and changes nothing, if too few are free.
    pub(crate) fn grow(&mut self, sequence: usize, tokens: usize) -> bool {
        let table = self.tables.entry(sequence).or_default();
        let missing = tokens.div_ceil(self.block_size).saturating_sub(table.len());
        if missing > self.free.len() {
            return false;
        }
        table.extend(self.free.drain(self.free.len() - missing..).rev());
        true
    }

    /// Takes the blocks of a sequence back.
    pub(crate) fn free(&mut self, sequence: usize) {
        self.free.extend(self.tables.remove(&sequence).unwrap_or_default());
    }

    /// The slot of a position: where its key and value are stored.
    pub(crate) fn slot(&self, sequence: usize, position: usize) -> i64 {
        let block = self.tables[&sequence][position / self.block_size];
        i64::from(block) * self.block_size as i64 + (position % self.block_size) as i64
    }

    /// The tables of some sequences, filled up with zeros to the length of the longest, and that length.
    pub(crate) fn padded_tables(&self, sequences: &[usize]) -> (Vec<u32>, usize) {
        let tables: Vec<&[u32]> = sequences.iter().map(|sequence| &*self.tables[sequence]).collect();
        let width = tables.iter().map(|table| table.len()).max().unwrap_or(0);
        (tables.iter().flat_map(|table| table.iter().copied().chain([0].repeat(width - table.len()))).collect(), width)
    }
}
