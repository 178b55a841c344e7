//! Making a block writable that others may read.

use std::ops::Range;

use super::Ledger;
use crate::{BlockId, OutOfBlocks};

/// The result of making a block writable and allocating blocks after it.
pub(crate) enum Writable {
    /// The caller may write to the block itself.
    InPlace,
    /// Others read the block: the first of the allocated blocks becomes its copy.
    Copy,
}

/// How a block can be written.
enum WriteMode {
    /// Only the caller uses it, and it is not cached.
    InPlace,
    /// Other lists use it, or it is cached: the caller writes to a copy.
    Copy,
    /// Only the caller uses it, but it is cached, and there is no room for a copy: it is uncached, then written. The
    /// running sequence needs the memory now; a sequence that would match the block may never come.
    Uncache,
}

impl WriteMode {
    /// How to write to a block, when `n` more blocks are requested and `available` are available.
    #[inline]
    fn of(sole_user: bool, cached: bool, n: usize, available: usize) -> Self {
        match (sole_user, cached) {
            (true, false) => Self::InPlace,
            (true, true) if n >= available => Self::Uncache,
            _ => Self::Copy,
        }
    }

    /// How many blocks to allocate: the copy, if there is one, and the `n` more.
    fn blocks(&self, n: usize) -> usize {
        n.saturating_add(usize::from(matches!(self, Self::Copy)))
    }
}

/// How many available blocks it costs to write to a block that `others` other lists use. If there are none, the block
/// is written in place, or it is copied and the original becomes evictable.
pub(super) fn cost_of_copy(others: u32) -> usize {
    usize::from(others > 0)
}

impl Ledger {
    /// Makes `block`, which the caller uses, writable and allocates `n` more blocks; see [`allocate`](Self::allocate).
    #[inline]
    pub(crate) fn make_writable(
        &mut self,
        block: BlockId,
        n: usize,
        last: Option<BlockId>,
        add_run: impl FnMut(Range<usize>),
    ) -> Result<(Writable, usize), OutOfBlocks> {
        let (sole_user, cached) = (self.ref_counts[block.index()] == 1, self.tree.contains(block));
        if sole_user && !cached && n == 0 {
            return Ok((Writable::InPlace, 0));
        }
        let mode = WriteMode::of(sole_user, cached, n, self.available());
        let after = if matches!(mode, WriteMode::Copy) { None } else { last };
        let evicted = self.allocate(mode.blocks(n), after, add_run)?;
        match mode {
            WriteMode::InPlace => return Ok((Writable::InPlace, evicted)),
            // All evictable blocks that follow it have been evicted by now: there was no other room.
            WriteMode::Uncache => self.uncache(block),
            WriteMode::Copy => return Ok((Writable::Copy, evicted)),
        }
        Ok((Writable::InPlace, evicted))
    }

    /// How many available blocks [`make_writable`](Self::make_writable) takes in the end, which is also the least it
    /// needs.
    pub(crate) fn copy_on_write_cost(&self, block: BlockId, n: usize) -> usize {
        n.saturating_add(cost_of_copy(self.ref_counts[block.index()] - 1))
    }

    pub(crate) fn count_copy(&mut self) {
        self.stats.copies += 1;
    }
}
