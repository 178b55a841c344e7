//! A model of vLLM's memory: blocks, one more whenever the last is full. Without its prefix cache.

use super::first_come::Memory;

pub(crate) struct Vllm {
    block_size: usize,
    blocks: usize,
    free: usize,
}

impl Vllm {
    pub(crate) fn new(tokens: usize, block_size: usize) -> Self {
        let blocks = tokens / block_size;
        Self { block_size, blocks, free: blocks }
    }
}

impl Memory for Vllm {
    /// The number of blocks.
    type Allocation = usize;

    fn start(&mut self, tokens: usize, _total: usize) -> Option<usize> {
        let needed = tokens.div_ceil(self.block_size);
        self.free = self.free.checked_sub(needed)?;
        Some(needed)
    }

    fn grow(&mut self, blocks: &mut usize, tokens: usize) -> bool {
        let more = tokens.div_ceil(self.block_size) - *blocks;
        let Some(free) = self.free.checked_sub(more) else { return false };
        self.free = free;
        *blocks += more;
        true
    }

    fn end(&mut self, blocks: usize) {
        self.free += blocks;
    }

    fn reserved(&self) -> usize {
        (self.blocks - self.free) * self.block_size
    }
}
