//! The shape of a tile: `TILE` consecutive tokens of a sequence, as panels.

use block_pool::PANEL;

use super::wide::LANES;

/// Panels per tile.
pub(super) const TILE_PANELS: usize = 4;
/// Tokens per tile. All scores of a tile are computed before its values are accumulated. Tiles begin at multiples of
/// this.
pub(super) const TILE: usize = TILE_PANELS * PANEL;

/// One row's scores of a tile, later replaced by its weights.
pub(super) type Scores = [[f32; LANES]; TILE_PANELS];
/// The keys, or the values, of a tile in one head. A panel is empty if it has no token or its block has been freed.
pub(super) type Panels<'a, N> = [&'a [N]; TILE_PANELS];
