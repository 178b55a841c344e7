//! Finds or gathers the keys and values of a tile, `TILE` consecutive tokens of a sequence.

use std::array::from_fn;
use std::ops::Range;

use block_pool::{KvLayout, Order, PANEL};

use super::format::Format;
use super::panels::{Panels, TILE_PANELS};
use super::wide::LANES;
use crate::plan::{Planned, VisibleRange};

/// All blocks of a layer, and the block table of one sequence.
pub(super) struct Blocks<'a, N> {
    pub(super) layer: &'a [N],
    pub(super) layout: &'a KvLayout,
    /// The ids of the sequence's blocks, in order.
    pub(super) ids: &'a [u32],
    pub(super) planned: &'a Planned,
    /// Whether tiles are gathered without the values of tokens that are not seen: for tasks of one new token.
    pub(super) visible_only: bool,
}

impl<'a, N> Blocks<'a, N> {
    /// Dimensions of a value in the kernels: `value_dim` rounded up to whole vectors.
    pub(super) fn dims(&self) -> usize {
        self.layout.value_dim.next_multiple_of(LANES)
    }

    /// Whether panels can be read in place. Tiles are gathered instead if the block size is not a multiple of a panel,
    /// if the dimensions of a value are no whole vectors, or if only visible tokens may be read. (Values in keys are
    /// transposed in any case.)
    fn in_place(&self) -> bool {
        debug_assert_ne!(self.layout.order, Order::Nhd);
        let whole = self.layout.values_in_keys || self.layout.value_dim.is_multiple_of(LANES);
        !self.visible_only && self.layout.block_size.is_multiple_of(PANEL) && whole
    }

    /// Finds the tile of these positions in consecutive heads, one entry of `tiles` per head. No entry if there are no
    /// positions, or if panels cannot be read in place.
    pub(super) fn locate(&self, positions: &Range<usize>, heads: &Range<usize>, tiles: &mut Vec<Tile<'a, N>>)
    where
        N: Copy,
    {
        tiles.clear();
        if positions.is_empty() || !self.in_place() {
            return;
        }
        tiles.resize(heads.len(), Tile { keys: [&[]; TILE_PANELS], values: [&[]; TILE_PANELS] });
        for (i, position) in positions.clone().step_by(PANEL).enumerate() {
            let Some(block) = self.block(position) else { continue };
            let panel = position % self.layout.block_size / PANEL;
            // The keys of a head are followed by its values, and these by the keys of the next head.
            let keys = self.layout.key_panel(heads.start, panel);
            let values = self.layout.value_panel(heads.start, panel);
            let mut rest = &block[keys.start..];
            for tile in tiles.iter_mut() {
                (tile.keys[i], rest) = rest.split_at(keys.len());
                (tile.values[i], rest) = rest.split_at(values.len());
            }
        }
    }

    /// The block of the token at `position`, unless it has been freed.
    #[inline(always)]
    pub(super) fn block(&self, position: usize) -> Option<&'a [N]> {
        let index = self.planned.index_of(position / self.layout.block_size)?;
        let id = *self.ids.get(index)?;
        let elements = self.layout.block_elements();
        Some(&self.layer[id as usize * elements..][..elements])
    }
}

/// A tile of tokens in one head.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a, N> {
    pub(super) keys: Panels<'a, N>,
    pub(super) values: Panels<'a, N>,
}

/// A tile of one head, gathered from its blocks.
pub(super) struct Copied<N> {
    keys: Vec<N>,
    values: Vec<N>,
    sizes: [usize; 2],
    present: [bool; TILE_PANELS],
}

impl<N> Default for Copied<N> {
    fn default() -> Self {
        Self { keys: Vec::new(), values: Vec::new(), sizes: [1; 2], present: [false; TILE_PANELS] }
    }
}

impl<N: Copy + Default> Copied<N> {
    /// Copies the tokens at these positions. If `seen` is given, copies only the visible ones; the values of the others
    /// are zeros.
    pub(super) fn fill<F: Format<Number = N>>(
        &mut self,
        blocks: &Blocks<'_, N>,
        head: usize,
        positions: &Range<usize>,
        seen: Option<&VisibleRange>,
    ) {
        let (layout, dims) = (blocks.layout, blocks.dims());
        self.sizes = F::panel_sizes(layout.head_dim, dims);
        if layout.values_in_keys {
            self.sizes[1] = 0;
        }
        self.keys.resize(TILE_PANELS * self.sizes[0], N::default());
        self.values.resize(TILE_PANELS * self.sizes[1], N::default());
        self.present.fill(false);
        if seen.is_some() {
            self.values.fill(N::default());
            if layout.values_in_keys {
                self.keys.fill(N::default());
            }
        }
        for (i, position) in positions.clone().enumerate() {
            if seen.is_some_and(|seen| i >= seen.sink_tokens && !seen.recent.contains(&i)) {
                continue;
            }
            let Some(block) = blocks.block(position) else { continue };
            let (panel, at) = (i / PANEL, i % PANEL);
            let keys = &mut self.keys[panel * self.sizes[0]..][..self.sizes[0]];
            let values = &mut self.values[panel * self.sizes[1]..][..self.sizes[1]];
            F::copy(layout, block, position % layout.block_size, head, (keys, values), at, dims);
            self.present[panel] = true;
        }
    }

    pub(super) fn tile(&self) -> Tile<'_, N> {
        Tile { keys: self.panels(&self.keys, self.sizes[0]), values: self.panels(&self.values, self.sizes[1]) }
    }

    fn panels<'a>(&self, numbers: &'a [N], size: usize) -> Panels<'a, N> {
        from_fn(|panel| if self.present[panel] { &numbers[panel * size..][..size] } else { &[] })
    }
}
