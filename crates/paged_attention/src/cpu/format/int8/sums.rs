//! Accumulates a tile: weights times values, as integers.
// Loops over arrays of vectors have constant bounds, so that they are unrolled: only then the arrays stay in registers.
#![allow(clippy::needless_range_loop)]

use block_pool::PANEL;

use super::{P_LARGEST, P_SHIFT, SCALE_UP, Weights, lines_to_prefetch, scales_of, split_scales};
use crate::cpu::arch::prefetch::prefetch;
use crate::cpu::panels::{Panels, Scores, TILE, TILE_PANELS};
use crate::cpu::wide::{LANES, Run, Wide, reduce_max_or_nan};

/// Vectors of values, of four tokens each, that are added to one vector of sums per panel.
const QUADS: usize = PANEL / 4;

/// Below this, the factor that scales weights to integers would be too large for f32.
const SMALL: f32 = 1e-34;

/// Multiplies each weight by the scale of its value, and quantises the products to two bytes each.
pub(super) struct QuantiseWeights<'a, 'v> {
    pub(super) weights: &'a [Scores],
    /// How many tokens of the tile exist.
    pub(super) tokens: usize,
    pub(super) values: &'a Panels<'v, u8>,
    pub(super) to: &'a mut Vec<Weights>,
}

impl Run for QuantiseWeights<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        let mut scales = [V::splat(0.0); TILE_PANELS];
        for panel in 0..TILE_PANELS {
            scales[panel] = scales_of(split_scales(self.values[panel]).1);
        }
        self.to.resize(self.weights.len(), Weights::default());
        for (weights, to) in self.weights.iter().zip(self.to) {
            let mut scaled = [[0f32; LANES]; TILE_PANELS];
            let mut largest = V::splat(0.0);
            for panel in 0..TILE_PANELS {
                V::load(&weights[panel]).mul(scales[panel]).store(&mut scaled[panel]);
            }
            // The scales of slots after the last token can be anything, NaN included.
            if self.tokens < TILE {
                scaled.as_flattened_mut()[self.tokens..].fill(0.0);
            }
            for scaled in &scaled {
                largest = V::load(scaled).max_or_nan(largest);
            }
            // NaN cannot be represented in the bytes, so it is kept in their scale.
            let mut largest = reduce_max_or_nan(largest);
            to.scale = largest / P_LARGEST;
            if largest > 0.0 && largest < SMALL {
                scaled.iter_mut().for_each(|scaled| V::load(scaled).mul(V::splat(SCALE_UP)).store(scaled));
                largest *= SCALE_UP;
            }
            let inverse = V::splat(if largest > 0.0 { P_LARGEST / largest } else { 0.0 });
            for panel in 0..TILE_PANELS {
                let quantised = V::load(&scaled[panel]).mul(inverse);
                quantised.split::<P_SHIFT>(&mut to.high[panel], &mut to.low[panel]);
            }
        }
    }
}

/// `sums (R, dims) += weights (R, tokens) values (tokens, dims)` for the first `tokens` of a tile.
#[inline(always)]
pub(super) fn tile<V: Wide, const R: usize>(
    weights: &[Weights],
    tokens: usize,
    values: &Panels<'_, u8>,
    next: Option<&Panels<'_, u8>>,
    sums: &mut [[f32; LANES]],
) {
    let Some(weights) = weights.first_chunk::<R>() else { return };
    let stride = sums.len() / R;
    let (mut quads, mut lines) = ([&[][..]; TILE_PANELS], [&[][..]; TILE_PANELS]);
    for panel in (0..TILE_PANELS).filter(|&panel| panel * PANEL < tokens) {
        quads[panel] = split_scales(values[panel]).0.as_chunks::<QUADS>().0;
        lines[panel] = &lines_to_prefetch(next, panel, values[panel]).as_chunks::<QUADS>().0[..quads[panel].len()];
    }
    let pairs = if V::INT_COLUMNS == 2 { stride / 2 * 2 } else { 0 };
    for column in (0..pairs).step_by(2) {
        V::outlined(Sum::<R, 2> { weights, quads, lines, column, stride, sums });
    }
    for column in pairs..stride {
        V::outlined(Sum::<R, 1> { weights, quads, lines, column, stride, sums });
    }
}

/// Accumulates C vectors of each row's sums, from vector `column` on.
struct Sum<'a, 's, const R: usize, const C: usize> {
    weights: &'a [Weights; R],
    /// For each panel, one strip after another, four vectors of four tokens each; empty if the panel has no token.
    quads: [&'a [[[u8; 4 * LANES]; QUADS]]; TILE_PANELS],
    /// Cache lines to prefetch, as many as `quads` has.
    lines: [&'a [[[u8; 4 * LANES]; QUADS]]; TILE_PANELS],
    column: usize,
    stride: usize,
    sums: &'s mut [[f32; LANES]],
}

impl<const R: usize, const C: usize> Run for Sum<'_, '_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        let Self { weights, column, stride, .. } = self;
        let [mut high, mut low] = [[[V::zero_ints(); C]; R]; 2];
        for panel in 0..TILE_PANELS {
            let quads = self.quads[panel].get(column..).and_then(|quads| quads.first_chunk::<C>());
            let lines = self.lines[panel].get(column..).and_then(|lines| lines.first_chunk::<C>());
            let (Some(quads), Some(lines)) = (quads, lines) else { continue };
            for quad in 0..QUADS {
                for c in 0..C {
                    prefetch(&lines[c][quad]);
                    let values = V::load_quads(&quads[c][quad]);
                    for r in 0..R {
                        high[r][c] = V::dot_signed(high[r][c], values, quad_of(&weights[r].high[panel], quad));
                        low[r][c] = V::dot_signed(low[r][c], values, quad_of(&weights[r].low[panel], quad));
                    }
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                let sum = V::from_ints(V::combine::<P_SHIFT>(high[r][c], low[r][c], 0));
                let sums = &mut self.sums[r * stride + column + c];
                sum.multiply_add(V::splat(weights[r].scale), V::load(sums)).store(sums);
            }
        }
    }
}

/// The bytes of the four tokens with index `quad` in a panel's weights.
#[inline(always)]
fn quad_of(weights: &[u8; PANEL], quad: usize) -> [u8; 4] {
    weights.as_chunks().0[quad]
}
