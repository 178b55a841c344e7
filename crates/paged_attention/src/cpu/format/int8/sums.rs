//! Sums of a tile: weights times values, as integers.
// Loops over all registers are unrolled when their bounds are constants, and only then stay registers.
#![allow(clippy::needless_range_loop)]

use block_pool::PANEL;

use super::{GROW, P_LARGEST, P_SHIFT, Weights, ahead, parts, scales_of};
use crate::cpu::arch::prefetch::prefetch;
use crate::cpu::format::Space;
use crate::cpu::kernel::Run;
use crate::cpu::tile::{Panels, Scores, TILE, TILE_PANELS};
use crate::cpu::wide::{LANES, Wide, largest_or_nan};

/// Registers of a panel that one register of sums takes in: four tokens each.
const QUADS: usize = PANEL / 4;

/// Below this the factor that makes whole numbers of weights would be beyond f32.
const SMALL: f32 = 1e-34;

/// Makes bytes of weights, each times the scale of its value.
pub(super) struct Split<'a, 'v> {
    pub(super) weights: &'a [Scores],
    /// Tokens that there are in the tile.
    pub(super) tokens: usize,
    pub(super) values: &'a Panels<'v, u8>,
    pub(super) space: &'a mut Space,
}

impl Run for Split<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        let mut scales = [V::splat(0.0); TILE_PANELS];
        for panel in 0..TILE_PANELS {
            scales[panel] = scales_of(parts(self.values[panel]).1);
        }
        self.space.weights.resize(self.weights.len(), Weights::default());
        for (weights, to) in self.weights.iter().zip(&mut self.space.weights) {
            let mut scaled = [[0f32; LANES]; TILE_PANELS];
            let mut most = V::splat(0.0);
            for panel in 0..TILE_PANELS {
                V::load(&weights[panel]).mul(scales[panel]).store(&mut scaled[panel]);
            }
            // Slots behind the last token hold anything, NaN included.
            if self.tokens < TILE {
                scaled.as_flattened_mut()[self.tokens..].fill(0.0);
            }
            for scaled in &scaled {
                most = V::load(scaled).larger_or_nan(most);
            }
            // What is not a number would leave no trace in bytes, and so does in what they stand for.
            let mut most = largest_or_nan(most);
            to.scale = most / P_LARGEST;
            if most > 0.0 && most < SMALL {
                scaled.iter_mut().for_each(|scaled| V::load(scaled).mul(V::splat(GROW)).store(scaled));
                most *= GROW;
            }
            let inverse = V::splat(if most > 0.0 { P_LARGEST / most } else { 0.0 });
            for panel in 0..TILE_PANELS {
                let whole = V::load(&scaled[panel]).mul(inverse);
                whole.split::<P_SHIFT>(&mut to.high[panel], &mut to.low[panel]);
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
        quads[panel] = parts(values[panel]).0.as_chunks::<QUADS>().0;
        lines[panel] = &ahead(next, panel, values[panel]).as_chunks::<QUADS>().0[..quads[panel].len()];
    }
    let pairs = if V::INT_COLUMNS == 2 { stride / 2 * 2 } else { 0 };
    for at in (0..pairs).step_by(2) {
        V::apart(Sum::<R, 2> { weights, quads, lines, at, stride, sums });
    }
    for at in pairs..stride {
        V::apart(Sum::<R, 1> { weights, quads, lines, at, stride, sums });
    }
}

/// C registers of each row's sums, from `at` on.
struct Sum<'a, 's, const R: usize, const C: usize> {
    weights: &'a [Weights; R],
    /// For each panel, strip after strip, four registers of four tokens each; nothing where there is no token.
    quads: [&'a [[[u8; 4 * LANES]; QUADS]]; TILE_PANELS],
    /// As much, to be asked for.
    lines: [&'a [[[u8; 4 * LANES]; QUADS]]; TILE_PANELS],
    at: usize,
    stride: usize,
    sums: &'s mut [[f32; LANES]],
}

impl<const R: usize, const C: usize> Run for Sum<'_, '_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        let Self { weights, at, stride, .. } = self;
        let [mut high, mut low] = [[[V::no_ints(); C]; R]; 2];
        for panel in 0..TILE_PANELS {
            let quads = self.quads[panel].get(at..).and_then(|quads| quads.first_chunk::<C>());
            let lines = self.lines[panel].get(at..).and_then(|lines| lines.first_chunk::<C>());
            let (Some(quads), Some(lines)) = (quads, lines) else { continue };
            for quad in 0..QUADS {
                for c in 0..C {
                    prefetch(&lines[c][quad]);
                    let values = V::load_quads(&quads[c][quad]);
                    for r in 0..R {
                        high[r][c] = V::dot_signed(high[r][c], values, four(&weights[r].high[panel], quad));
                        low[r][c] = V::dot_signed(low[r][c], values, four(&weights[r].low[panel], quad));
                    }
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                let sum = V::floats(V::combine::<P_SHIFT>(high[r][c], low[r][c], 0));
                let sums = &mut self.sums[r * stride + at + c];
                sum.multiply_add(V::splat(weights[r].scale), V::load(sums)).store(sums);
            }
        }
    }
}

/// Four bytes of a panel's weights.
#[inline(always)]
fn four(weights: &[u8; PANEL], quad: usize) -> [u8; 4] {
    weights.as_chunks().0[quad]
}
