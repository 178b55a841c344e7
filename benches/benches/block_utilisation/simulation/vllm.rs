//! vLLM's memory: blocks, one more whenever the last is full. Without its prefix cache.

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
    /// Blocks held.
    type Held = usize;

    fn start(&mut self, tokens: usize, _total: usize) -> Option<usize> {
        let needed = tokens.div_ceil(self.block_size);
        self.free = self.free.checked_sub(needed)?;
        Some(needed)
    }

    fn grow(&mut self, held: &mut usize, tokens: usize) -> bool {
        let more = tokens.div_ceil(self.block_size) - *held;
        let Some(free) = self.free.checked_sub(more) else { return false };
        self.free = free;
        *held += more;
        true
    }

    fn end(&mut self, held: usize) {
        self.free += held;
    }

    fn reserved(&self) -> usize {
        (self.blocks - self.free) * self.block_size
    }
}
