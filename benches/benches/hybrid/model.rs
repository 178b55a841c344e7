//! The shapes of the models, and pools for them.

use anyhow::Result;
use paged_attention::{BlockPool, PoolGroup, Span, Window};

/// How many tokens a block holds.
pub(crate) const BLOCK_SIZE: usize = 16;

/// Layers of one shape and one span.
#[derive(Clone, Copy)]
pub(crate) struct Layers {
    count: usize,
    kv_heads: usize,
    head_dim: usize,
    span: Span,
}

impl Layers {
    /// The bytes of a block of one layer: keys and values, both bf16.
    const fn bytes_of_block(&self) -> usize {
        BLOCK_SIZE * self.kv_heads * self.head_dim * 2 * size_of::<u16>()
    }
}

/// A model with two groups of layers: those with a window, and those that see all tokens.
pub(crate) struct Model {
    pub(crate) name: &'static str,
    windowed: Layers,
    full: Layers,
}

impl Model {
    /// Six layers with 8 query heads and 4 heads of keys and values: one of Gemma 3's repetitions.
    pub(crate) fn five_to_one() -> Self {
        Self::new("5:1", 512, [5, 1], [4, 4], [256, 256])
    }

    pub(crate) fn gemma_3_27b() -> Self {
        Self::new("gemma-3-27b", 1024, [52, 10], [16, 16], [128, 128])
    }

    pub(crate) fn gpt_oss_20b() -> Self {
        Self::new("gpt-oss-20b", 128, [12, 12], [8, 8], [64, 64])
    }

    /// The shapes are assumed: 50 layers with a window of 1,024 and 16 heads of 256, and 10 layers that see all tokens,
    /// with 4 heads of 512 and keys stored apart from values.
    pub(crate) fn gemma_4_31b() -> Self {
        Self::new("gemma-4-31b", 1024, [50, 10], [16, 4], [256, 512])
    }

    /// Each array has the number of the windowed layers and that of the full ones.
    fn new(name: &'static str, window: usize, count: [usize; 2], kv_heads: [usize; 2], head_dim: [usize; 2]) -> Self {
        let layers = |i: usize, span| Layers { count: count[i], kv_heads: kv_heads[i], head_dim: head_dim[i], span };
        Self { name, windowed: layers(0, Window::new(window).into()), full: layers(1, Span::all()) }
    }

    /// The bytes of a unit of the budget: the largest number that divides the blocks of both groups.
    pub(crate) fn bytes_of_unit(&self) -> usize {
        let bytes = |layers: Layers| layers.count * layers.bytes_of_block();
        let (mut a, mut b) = (bytes(self.windowed), bytes(self.full));
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    }

    fn group(&self, layers: Layers) -> PoolGroup {
        PoolGroup::new(layers.count * layers.bytes_of_block() / self.bytes_of_unit()).span(layers.span)
    }

    /// The group of the windowed layers, then that of the full ones.
    pub(crate) fn groups(&self) -> [PoolGroup; 2] {
        [self.group(self.windowed), self.group(self.full)]
    }

    /// How many units a block of all layers takes.
    pub(crate) fn units_of_all_layers(&self) -> usize {
        self.groups().iter().map(|group| group.units).sum()
    }

    /// A pool of both groups, which share `units` units.
    pub(crate) fn grouped(&self, units: usize) -> Result<BlockPool> {
        Ok(BlockPool::of_groups(units, BLOCK_SIZE, &self.groups())?)
    }

    /// A pool in which all layers, each with its own shape, keep all tokens.
    pub(crate) fn ungrouped(&self, units: usize) -> Result<BlockPool> {
        Ok(BlockPool::of_groups(units, BLOCK_SIZE, &[PoolGroup::new(self.units_of_all_layers())])?)
    }
}
