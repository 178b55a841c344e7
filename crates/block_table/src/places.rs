//! Tables whose slots are written out of order: for callers whose layers do not take their tokens together.

use std::ops::Range;

use block_pool::ReserveError;

use crate::BlockTable;

impl BlockTable {
    /// Makes the slots of `positions` safe to write, those of committed tokens too: a block that others hold, or could
    /// find by its tokens, is exchanged for a copy. Positions without a slot are left out.
    ///
    /// When committed tokens are among them, the table no longer knows what it holds: its prefixes are neither stored nor
    /// sought from then on.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] when there is no room for a copy or it fails. The sequence has the same content then.
    pub fn own(&mut self, positions: Range<usize>) -> Result<(), ReserveError> {
        if positions.is_empty() {
            return Ok(());
        }
        let block_size = self.pool().block_size();
        for block in positions.start / block_size..positions.end.div_ceil(block_size) {
            if let Some(at) = self.place(block) {
                self.blocks.own_and_grow(at, 0)?;
            }
        }
        if positions.start < self.len {
            (self.private, self.tail) = (true, None);
        }
        Ok(())
    }

    /// Gives the blocks back that were reserved beyond position `end`. Committed tokens stay.
    pub fn shrink_to(&mut self, end: usize) {
        self.blocks.truncate(self.pool().blocks_for(end.max(self.len)) - self.gap);
    }

    /// Gives the blocks back that lie wholly before `position`, as a window does: for sequences whose first tokens are kept
    /// elsewhere from now on. Only committed tokens can be given back, and not where there is a window.
    pub fn release_before(&mut self, position: usize) {
        let behind = position.min(self.len) / self.pool().block_size();
        if self.window().is_none() && behind > self.gap {
            self.blocks.remove(0..behind - self.gap);
            self.gap = behind;
        }
    }
}
