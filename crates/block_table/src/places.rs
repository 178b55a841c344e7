//! Tables whose slots are written out of order: for callers whose layers do not take their tokens together.

use std::ops::Range;

use block_pool::ReserveError;

use crate::BlockTable;

impl BlockTable {
    /// Makes the slots of `positions` safe to write, those of committed tokens too: a block that others hold, or could
    /// find by its tokens, is exchanged for a copy. Positions without a slot are left out, and a range that ends before it
    /// starts has none.
    ///
    /// When committed tokens are among them, the table no longer knows what it holds: its prefixes are neither stored nor
    /// sought from then on. What was stored before stays so, blocks of the table that are not exchanged included.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] when there is no room for a copy or it fails. The sequence has the same content then.
    pub fn own(&mut self, positions: Range<usize>) -> Result<(), ReserveError> {
        if positions.is_empty() {
            return Ok(());
        }
        let block_size = self.pool().block_size();
        let blocks = positions.start / block_size..positions.end.div_ceil(block_size);
        // Where they stand in the list, before the gap and behind it: however many are asked for, no more than there are.
        let (before, missing) = self.gap();
        let behind = |block: usize| block.saturating_sub(missing).clamp(before, self.blocks.len());
        let places = [blocks.start.min(before)..blocks.end.min(before), behind(blocks.start)..behind(blocks.end)];
        for at in places.into_iter().flatten() {
            self.blocks.own_and_grow(at, 0)?;
        }
        if positions.start < self.len {
            (self.private, self.tail) = (true, None);
        }
        Ok(())
    }

    /// Gives the blocks back that were reserved beyond position `end`. Committed tokens stay, whatever `end` is.
    pub fn shrink_to(&mut self, end: usize) {
        self.blocks.truncate(self.pool().blocks_for(end.max(self.len)) - self.gap);
    }

    /// Gives the blocks back that lie wholly before `position`, as a window does: for sequences whose first tokens are kept
    /// elsewhere from now on. Only committed tokens can be given back, and not where there is a window: a `position` beyond the
    /// last one counts as all of them, and with a window nothing happens. The sequence can then no longer be truncated to a
    /// length that ends in what was given back, unless that is 0.
    pub fn release_before(&mut self, position: usize) {
        let behind = position.min(self.len) / self.pool().block_size();
        if self.window().is_none() && behind > self.gap {
            self.blocks.remove(0..behind - self.gap);
            self.gap = behind;
        }
    }
}
