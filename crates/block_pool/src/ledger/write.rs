//! What it takes to write to a block that others may read.

use std::ops::Range;

use super::Ledger;
use crate::{BlockId, OutOfBlocks};

/// What became of a request for a block that may be written and for more after it.
pub(crate) enum Owned {
    /// The block is the caller's own.
    InPlace,
    /// Others read the block: the first of the taken blocks is to become its copy.
    Copy,
}

/// How a block can be written.
enum Way {
    /// Nobody else reads it.
    InPlace,
    /// Others hold it, or could find it: a copy is written.
    Copy,
    /// Others could find it, and there is no room for a copy: it is forgotten, and then written. What is kept only for those
    /// who might come gives way to those who are here.
    Forget,
}

impl Way {
    /// How the block of one holder is written that also wants `n` further blocks, of `available`.
    #[inline]
    fn of(alone: bool, cached: bool, n: usize, available: usize) -> Self {
        match (alone, cached) {
            (true, false) => Self::InPlace,
            (true, true) if n >= available => Self::Forget,
            _ => Self::Copy,
        }
    }

    /// How many blocks are taken, for the block and the `n` further ones.
    fn blocks(&self, n: usize) -> usize {
        n.saturating_add(usize::from(matches!(self, Self::Copy)))
    }
}

/// How many blocks it costs to write to a block that `others` hold, too. If nobody does, it is written in place, or its
/// original is available when it has been copied.
pub(super) fn cost_of_copy(others: u32) -> usize {
    usize::from(others > 0)
}

impl Ledger {
    /// Makes sure that the caller, who holds `block`, may write to it, and takes `n` more; returns as [`take`](Self::take).
    #[inline]
    pub(crate) fn own(
        &mut self,
        block: BlockId,
        n: usize,
        last: Option<BlockId>,
        taken: impl FnMut(Range<usize>),
    ) -> Result<(Owned, usize), OutOfBlocks> {
        let (alone, cached) = (self.holders[block.index()] == 1, self.tree.contains(block));
        if alone && !cached && n == 0 {
            return Ok((Owned::InPlace, 0));
        }
        let way = Way::of(alone, cached, n, self.available());
        let after = if matches!(way, Way::Copy) { None } else { last };
        let evicted = self.take(way.blocks(n), after, taken)?;
        match way {
            Way::InPlace => return Ok((Owned::InPlace, evicted)),
            // Whatever follows it that nobody holds has been evicted by now: there was no room but that.
            Way::Forget => self.forget(block),
            Way::Copy => return Ok((Owned::Copy, evicted)),
        }
        Ok((Owned::InPlace, evicted))
    }

    /// By how many the blocks that are available would be fewer after [`own`](Self::own), and how many it needs at least.
    pub(crate) fn cost(&self, block: BlockId, n: usize) -> usize {
        n.saturating_add(cost_of_copy(self.holders[block.index()] - 1))
    }

    pub(crate) fn count_copy(&mut self) {
        self.stats.copies += 1;
    }
}
