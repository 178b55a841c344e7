//! Accumulates a tile: weights times values.
// Loops over arrays of vectors have constant bounds, so that they are unrolled: only then the arrays stay in registers.
#![allow(clippy::needless_range_loop)]

use std::array::from_fn;

use block_pool::{PANEL, STRIP};

use super::{or_current, prefetch_vector, vectors};
use crate::cpu::format::Number;
use crate::cpu::panels::{Panels, Scores, TILE_PANELS};
use crate::cpu::wide::{LANES, Run, Wide};

/// Vectors per full strip.
pub(super) const STRIP_VECTORS: usize = STRIP / LANES;

/// `sums (R, dims) += weights (R, tokens) values (tokens, dims)` for the first `tokens` of a tile, one strip after
/// another.
#[inline(always)]
pub(super) fn tile<V: Wide, T: Number, const R: usize>(
    weights: &[Scores],
    tokens: usize,
    values: &Panels<'_, T>,
    next: Option<&Panels<'_, T>>,
    sums: &mut [[f32; LANES]],
) {
    let Some(weights) = weights.first_chunk::<R>() else { return };
    let stride = sums.len() / R;
    let tile = Inputs::new(weights, tokens, values, next, stride);
    for first in (0..stride).step_by(STRIP_VECTORS) {
        let strip = Strip { first, stored: first, width: STRIP_VECTORS.min(stride - first), column: 0 };
        strip_of::<V, T, R>(&tile, strip, next.is_some(), sums);
    }
}

/// The same for one strip: `width` vectors of each value, from vector `first` on. `values` has that strip only.
#[inline(always)]
pub(super) fn strip<V: Wide, const R: usize>(
    weights: &[Scores],
    tokens: usize,
    values: &Panels<'_, f32>,
    first: usize,
    width: usize,
    sums: &mut [[f32; LANES]],
) {
    let Some(weights) = weights.first_chunk::<R>() else { return };
    let tile = Inputs::new(weights, tokens, values, None, sums.len() / R);
    strip_of::<V, f32, R>(&tile, Strip { first, stored: 0, width, column: 0 }, false, sums);
}

#[inline(always)]
fn strip_of<V: Wide, T: Number, const R: usize>(
    tile: &Inputs<'_, T, R>,
    strip: Strip,
    prefetch: bool,
    sums: &mut [[f32; LANES]],
) {
    if V::COLUMNS == STRIP_VECTORS && strip.width == STRIP_VECTORS {
        sum::<V, T, R, STRIP_VECTORS>(tile, strip, prefetch, sums);
    } else {
        (0..strip.width).for_each(|column| sum::<V, T, R, 1>(tile, Strip { column, ..strip }, prefetch, sums));
    }
}

/// A tile's values and their weights, and the values to prefetch.
struct Inputs<'a, T, const R: usize> {
    weights: &'a [Scores; R],
    values: &'a Panels<'a, T>,
    /// How many tokens of each panel are read.
    tokens: [usize; TILE_PANELS],
    /// Whether these are all.
    full: bool,
    next: &'a Panels<'a, T>,
    /// Vectors per row of `sums`.
    stride: usize,
}

impl<'a, T, const R: usize> Inputs<'a, T, R> {
    #[inline(always)]
    fn new(
        weights: &'a [Scores; R],
        tokens: usize,
        values: &'a Panels<'a, T>,
        next: Option<&'a Panels<'a, T>>,
        stride: usize,
    ) -> Self {
        // Slots after the last token can contain anything, NaN included, so they are not read. Nor are blocks that were
        // freed.
        let count = |panel: usize| PANEL.min(tokens.saturating_sub(panel * PANEL));
        let tokens: [_; TILE_PANELS] = from_fn(|panel| if values[panel].is_empty() { 0 } else { count(panel) });
        let full = tokens.iter().all(|&tokens| tokens == PANEL);
        Self { weights, values, tokens, full, next: next.unwrap_or(values), stride }
    }
}

/// A strip: `width` vectors of each value, from vector `first` of the value on, which is vector `stored` of what the
/// panels have. `column` is the vector of the strip to begin with.
#[derive(Clone, Copy)]
struct Strip {
    first: usize,
    stored: usize,
    width: usize,
    column: usize,
}

impl Strip {
    /// This strip of a panel; empty if the panel is empty.
    #[inline(always)]
    fn of<'a, T>(&self, panel: &'a [T]) -> &'a [[T; LANES]] {
        vectors(panel).get(self.stored * PANEL..(self.stored + self.width) * PANEL).unwrap_or_default()
    }
}

#[inline(always)]
fn sum<V: Wide, T: Number, const R: usize, const C: usize>(
    tile: &Inputs<'_, T, R>,
    strip: Strip,
    prefetch: bool,
    sums: &mut [[f32; LANES]],
) {
    match (tile.full, prefetch) {
        (true, true) => V::outlined(Sum::<T, R, C, true, true> { tile, strip, sums }),
        (true, false) => V::outlined(Sum::<T, R, C, true, false> { tile, strip, sums }),
        (false, _) => V::outlined(Sum::<T, R, C, false, false> { tile, strip, sums }),
    }
}

/// Accumulates C vectors of a strip, from its `column` on, into each row's sums. `FULL`: all panels have sixteen
/// tokens. `PREFETCH`: there are values to prefetch.
struct Sum<'a, T, const R: usize, const C: usize, const FULL: bool, const PREFETCH: bool> {
    tile: &'a Inputs<'a, T, R>,
    strip: Strip,
    sums: &'a mut [[f32; LANES]],
}

impl<T: Number, const R: usize, const C: usize, const FULL: bool, const PREFETCH: bool> Run
    for Sum<'_, T, R, C, FULL, PREFETCH>
{
    type Output = ();

    /// Reads the panels in parallel, as the scores do: each is a sequential stream for the hardware prefetcher, and
    /// several streams keep more memory reads in flight than one.
    #[inline(always)]
    fn run<V: Wide>(self) {
        let Self { tile: &Inputs { weights, values, ref tokens, next, stride, .. }, mut strip, sums: rows } = self;
        if C == STRIP_VECTORS {
            // These are constants if a full strip is accumulated at once.
            (strip.width, strip.column) = (C, 0);
        }
        let Strip { first, width, column, .. } = strip;
        let (mut strips, mut ahead) = ([&[][..]; TILE_PANELS], [&[][..]; TILE_PANELS]);
        for panel in 0..TILE_PANELS {
            strips[panel] = strip.of(values[panel]);
            ahead[panel] = strip.of(or_current(next[panel], values[panel]));
            if FULL {
                // Cut to one length that the compiler knows, so that no bounds are checked in the loop.
                strips[panel] = &strips[panel][..PANEL * width];
                ahead[panel] = &ahead[panel][..PANEL * width];
            }
        }
        let mut sums = [[V::splat(0.0); C]; R];
        for r in 0..R {
            let Some(row) = rows[r * stride + first + column..].first_chunk::<C>() else { return };
            for c in 0..C {
                sums[r][c] = V::load(&row[c]);
            }
        }
        for token in 0..PANEL {
            for panel in 0..TILE_PANELS {
                if !FULL && token >= tokens[panel] {
                    continue;
                }
                let index = token * width + column;
                let mut row = [V::splat(0.0); C];
                for c in 0..C {
                    row[c] = T::load(&strips[panel][index + c]);
                    if PREFETCH {
                        prefetch_vector(index + c, &ahead[panel][index + c]);
                    }
                }
                for r in 0..R {
                    let x = V::splat(weights[r][panel][token]);
                    for c in 0..C {
                        sums[r][c] = x.multiply_add(row[c], sums[r][c]);
                    }
                }
            }
        }
        for r in 0..R {
            let Some(row) = rows[r * stride + first + column..].first_chunk_mut::<C>() else { return };
            for c in 0..C {
                sums[r][c].store(&mut row[c]);
            }
        }
    }
}
