//! A model of SGLang's memory: slots of one token. A request starts when its prompt and its whole answer fit, so that
//! no sequence is ever preempted. The answer's length is known here, which favours this model: a server knows only the
//! limit that a client sets.

use super::first_come::Memory;

pub(crate) struct Sglang {
    tokens: usize,
    free: usize,
}

impl Sglang {
    pub(crate) fn new(tokens: usize) -> Self {
        Self { tokens, free: tokens }
    }
}

impl Memory for Sglang {
    /// The reserved slots.
    type Allocation = usize;

    fn start(&mut self, _tokens: usize, total: usize) -> Option<usize> {
        self.free = self.free.checked_sub(total)?;
        Some(total)
    }

    fn grow(&mut self, _allocation: &mut usize, _tokens: usize) -> bool {
        true
    }

    fn end(&mut self, slots: usize) {
        self.free += slots;
    }

    fn reserved(&self) -> usize {
        self.tokens - self.free
    }
}
