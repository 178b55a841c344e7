//! The blocks of one sequence in one group.

use smallvec::SmallVec;

use crate::BlockId;

/// The ids of a short sequence are stored inline, without an allocation.
pub(crate) type Ids = SmallVec<[BlockId; 8]>;

/// A sequence's blocks in one group: those of the sink tokens, then those after the freed ones.
#[derive(Debug, Default)]
pub(crate) struct List {
    pub(crate) ids: Ids,
    /// How many blocks after those of the sink tokens were freed.
    pub(crate) freed: usize,
}

impl List {
    /// How many blocks of tokens the sequence has, freed or not.
    #[inline]
    pub(crate) fn end(&self) -> usize {
        self.ids.len() + self.freed
    }

    /// The index in the list of block number `block` of the sequence; `None` if it was freed or does not exist.
    #[inline]
    pub(crate) fn index_of(&self, block: usize, sink_blocks: usize) -> Option<usize> {
        let at = match block {
            _ if block < sink_blocks || self.freed == 0 => block,
            _ => block.checked_sub(self.freed).filter(|&at| at >= sink_blocks)?,
        };
        (at < self.ids.len()).then_some(at)
    }

    /// The block with this number in the sequence, if it was not freed.
    #[inline]
    pub(crate) fn block(&self, block: usize, sink_blocks: usize) -> Option<BlockId> {
        self.index_of(block, sink_blocks).map(|at| self.ids[at])
    }
}
