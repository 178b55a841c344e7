//! Where the keys and values of neighbouring tokens lie.

use std::array::from_fn;
use std::ops::Range;

use block_pool::{KvLayout, Order, PANEL};

use super::format::Format;
use super::wide::LANES;
use crate::plan::{Sight, Span};

/// Panels of a tile.
pub(super) const TILE_PANELS: usize = 4;
/// Tokens of a tile: their scores are computed before they are weighed. Tiles begin at multiples of it.
pub(super) const TILE: usize = TILE_PANELS * PANEL;

/// One row's scores of a tile, then its weights.
pub(super) type Scores = [[f32; LANES]; TILE_PANELS];
/// The keys, or the values, of a tile in one head; empty where there is no token or its block has been given back.
pub(super) type Panels<'a, N> = [&'a [N]; TILE_PANELS];

/// All blocks of a layer, and those of one sequence.
pub(super) struct Blocks<'a, N> {
    pub(super) layer: &'a [N],
    pub(super) layout: &'a KvLayout,
    /// The sequence's blocks, in order.
    pub(super) ids: &'a [u32],
    pub(super) span: &'a Span,
    /// Whether tiles are copied together without the values of tokens that are not seen: for tasks of one new token.
    pub(super) only_seen: bool,
}

impl<'a, N> Blocks<'a, N> {
    /// Dimensions of a value as kernels see it: whole registers.
    pub(super) fn dims(&self) -> usize {
        self.layout.head_dim.next_multiple_of(LANES)
    }

    /// Whether panels can be read where they lie. Otherwise tiles are copied together: blocks that are no multiple of a
    /// panel, heads that are no multiple of a register, and where only what is seen may be read.
    fn in_place(&self) -> bool {
        debug_assert_ne!(self.layout.order, Order::TokenMajor);
        !self.only_seen && self.layout.block_size.is_multiple_of(PANEL) && self.layout.head_dim.is_multiple_of(LANES)
    }

    /// Finds the tile of these positions in some heads, one after the other; in none if there are no positions, or if panels
    /// cannot be read where they lie.
    pub(super) fn find(&self, positions: &Range<usize>, heads: &Range<usize>, tiles: &mut Vec<Tile<'a, N>>)
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
            // Behind a head's keys lie its values, and behind these the keys of the next one.
            let keys = self.layout.key_panel(heads.start, panel);
            let values = self.layout.value_panel(heads.start, panel);
            let mut rest = &block[keys.start..];
            for tile in tiles.iter_mut() {
                (tile.keys[i], rest) = rest.split_at(keys.len());
                (tile.values[i], rest) = rest.split_at(values.len());
            }
        }
    }

    /// The block of the token at `position`, unless it has been given back.
    #[inline(always)]
    pub(super) fn block(&self, position: usize) -> Option<&'a [N]> {
        let place = self.span.place(position / self.layout.block_size)?;
        let id = *self.ids.get(place)?;
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

/// A tile of one head, copied together.
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
    /// Copies the tokens at these positions, or, if `seen` is given, those of them that are seen; the values of the others
    /// are zeros then.
    pub(super) fn fill<F: Format<Number = N>>(
        &mut self,
        blocks: &Blocks<'_, N>,
        head: usize,
        positions: &Range<usize>,
        seen: Option<&Sight>,
    ) {
        let (layout, dims) = (blocks.layout, blocks.dims());
        self.sizes = F::panel_sizes(layout.head_dim, dims);
        self.keys.resize(TILE_PANELS * self.sizes[0], N::default());
        self.values.resize(TILE_PANELS * self.sizes[1], N::default());
        self.present.fill(false);
        if seen.is_some() {
            self.values.fill(N::default());
        }
        for (i, position) in positions.clone().enumerate() {
            if seen.is_some_and(|seen| i >= seen.sinks && !seen.recent.contains(&i)) {
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
