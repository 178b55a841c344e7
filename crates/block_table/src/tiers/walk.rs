//! The place of a block in a tier.

use block_pool::{SaltFrom, TierCursor};

/// Those of the salts that begin in a block.
pub(super) fn salts_of(salts: &[SaltFrom], number: usize, block_size: usize) -> &[SaltFrom] {
    SaltFrom::at(salts, number * block_size..(number + 1) * block_size)
}

/// A cursor that goes over the blocks of a sequence.
pub(super) struct Walk<'a> {
    pub(super) cursor: Box<dyn TierCursor + 'a>,
    tokens: &'a [u32],
    salts: &'a [SaltFrom],
    block_size: usize,
    /// The number of the next block.
    next: usize,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        cursor: Box<dyn TierCursor + 'a>,
        tokens: &'a [u32],
        salts: &'a [SaltFrom],
        block_size: usize,
    ) -> Self {
        Self { cursor, tokens, salts, block_size, next: 0 }
    }

    /// Goes on to block `number`.
    pub(super) fn advance_to(&mut self, number: usize) {
        while self.next <= number {
            let tokens = &self.tokens[self.next * self.block_size..][..self.block_size];
            self.cursor.advance(tokens, salts_of(self.salts, self.next, self.block_size));
            self.next += 1;
        }
    }
}
