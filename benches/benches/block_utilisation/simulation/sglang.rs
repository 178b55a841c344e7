//! SGLang's memory: places of one token, and a request starts when its prompt and its whole answer fit, so that nobody
//! ever yields. The answer's length is known here, which favours it: a server knows only the limit that a client sets.

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
    /// Places promised.
    type Held = usize;

    fn start(&mut self, _tokens: usize, total: usize) -> Option<usize> {
        self.free = self.free.checked_sub(total)?;
        Some(total)
    }

    fn grow(&mut self, _held: &mut usize, _tokens: usize) -> bool {
        true
    }

    fn end(&mut self, held: usize) {
        self.free += held;
    }

    fn reserved(&self) -> usize {
        self.tokens - self.free
    }
}
