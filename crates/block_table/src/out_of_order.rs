//! Tables whose slots are written out of order: for callers whose layers do not process their tokens together.

use std::ops::Range;

use block_pool::ReserveError;

use crate::BlockTable;

impl BlockTable {
    /// Makes the slots of `positions` writable, also those of committed tokens: a block that another table uses too, or
    /// that is cached, is replaced by a copy (copy-on-write). If there is no room for the copy and no other table uses
    /// the block, it is uncached instead. Positions without a slot are skipped, and a range that ends before it starts
    /// is empty.
    ///
    /// If any of the positions is committed, the content of its block may not belong to the known tokens any more. So
    /// the table becomes [private](crate::TableOptions::private()): from then on no prefix of it is cached or matched.
    /// Blocks that were cached before stay cached, including those of this table that were not replaced.
    ///
    /// # Errors
    ///
    /// [`ReserveError`] when there is no room for a copy or the copy fails. The content of the sequence is then
    /// unchanged, though some of its blocks may have been replaced by copies.
    pub fn make_writable(&mut self, positions: Range<usize>) -> Result<(), ReserveError> {
        if positions.is_empty() {
            return Ok(());
        }
        let block_size = self.pool().block_size();
        let blocks = positions.start / block_size..positions.end.div_ceil(block_size);
        // Clamped to the table, so that a huge range of positions takes no longer than the table is.
        for number in blocks.start..blocks.end.min(self.blocks.end()) {
            self.blocks.copy_on_write(number, 0)?;
        }
        if positions.start < self.len {
            (self.private, self.tail) = (true, None);
        }
        Ok(())
    }

    /// Frees the reserved blocks that lie wholly at or after position `end`. Blocks with committed tokens are kept,
    /// whatever `end` is.
    pub fn shrink_to(&mut self, end: usize) {
        self.blocks.truncate(self.pool().blocks_for(end.max(self.len)));
    }

    /// Frees the blocks that lie wholly before `position`, as a window does: for sequences whose first tokens are
    /// stored elsewhere from now on. Only blocks of committed tokens are freed: a `position` after the last token
    /// counts as the length. On a table with a window, in any group, this does nothing. Afterwards the sequence cannot be truncated to
    /// a length inside the freed range, except to 0.
    pub fn free_before(&mut self, position: usize) {
        self.blocks.free_before(position.min(self.len) / self.pool().block_size());
    }
}
