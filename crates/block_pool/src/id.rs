//! The id of a block.

use std::fmt;

/// The index of one block in its pool.
///
/// An id is a plain number. It can be copied and printed, and it is the block's row in the device tensor, but no public
/// method takes an id and frees or writes the block. [`Blocks`](crate::Blocks) owns the blocks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct BlockId(u32);

impl BlockId {
    pub(crate) fn new(index: usize) -> Self {
        // A pool has at most `MAX_SLOTS` slots, so its indices fit.
        Self(index as u32)
    }

    /// The block's row in the device tensor.
    #[inline]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}
