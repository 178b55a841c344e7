//! A group of layers, as the pool sees it.

use crate::{BlockId, Span};

/// A group of layers that share their blocks: layers of one shape, one type and one [`Span`].
///
/// A sequence has a list of blocks in each group. Each block of a group holds the same number of tokens, for all layers
/// of the group, and takes `units` units of the pool's budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolGroup {
    /// Which tokens the layers of the group see.
    pub span: Span,
    /// How many units of the budget a block takes.
    pub units: usize,
}

impl PoolGroup {
    /// A group whose tokens see all earlier tokens, with blocks of this many units.
    pub const fn new(units: usize) -> Self {
        Self { span: Span::all(), units }
    }

    /// Sets the span.
    #[must_use]
    pub fn span(self, span: impl Into<Span>) -> Self {
        Self { span: span.into(), ..self }
    }
}

/// A block, and the group it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct GroupBlock {
    /// The index of the group.
    pub group: usize,
    /// The block.
    pub block: BlockId,
}

/// How many blocks of a group are taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupBlocks {
    /// Blocks in use. A block that several sequences share counts once.
    pub in_use: usize,
    /// Blocks that are cached and not in use.
    pub evictable: usize,
}
