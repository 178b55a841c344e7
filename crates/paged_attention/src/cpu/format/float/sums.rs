//! Sums of a tile: weights times values.
// Loops over all registers are unrolled when their bounds are constants, and only then stay registers.
#![allow(clippy::needless_range_loop)]

use std::array::from_fn;

use block_pool::{PANEL, STRIP};

use super::{ask, chunks, known};
use crate::cpu::format::Number;
use crate::cpu::kernel::Run;
use crate::cpu::tile::{Panels, Scores, TILE_PANELS};
use crate::cpu::wide::{LANES, Wide};

/// Chunks of a whole strip.
const STRIP_CHUNKS: usize = STRIP / LANES;

/// `sums (R, dims) += weights (R, tokens) values (tokens, dims)` for the first `tokens` of a tile, strip after strip.
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
    // Slots behind the last token hold anything, NaN included: they are not read. Nor are blocks that were given back.
    let count = |panel: usize| PANEL.min(tokens.saturating_sub(panel * PANEL));
    let tokens: [_; TILE_PANELS] = from_fn(|panel| if values[panel].is_empty() { 0 } else { count(panel) });
    let tile = Weighed { weights, values, tokens, next: next.unwrap_or(values), stride };
    let whole = tokens.iter().all(|&tokens| tokens == PANEL);
    for first in (0..stride).step_by(STRIP_CHUNKS) {
        let width = STRIP_CHUNKS.min(stride - first);
        let strip = Strip { first, width, column: 0 };
        if V::COLUMNS == STRIP_CHUNKS && width == STRIP_CHUNKS {
            sum::<V, T, R, STRIP_CHUNKS>(&tile, strip, whole, next.is_some(), sums);
        } else {
            (0..width)
                .for_each(|column| sum::<V, T, R, 1>(&tile, Strip { column, ..strip }, whole, next.is_some(), sums));
        }
    }
}

/// A tile's values and their weights, and the values to ask for.
struct Weighed<'a, T, const R: usize> {
    weights: &'a [Scores; R],
    values: &'a Panels<'a, T>,
    /// How many of each panel's tokens there are.
    tokens: [usize; TILE_PANELS],
    next: &'a Panels<'a, T>,
    /// Chunks of a row of sums.
    stride: usize,
}

/// A strip: the chunks of each value from `first` on, `width` of them; and one of these.
#[derive(Clone, Copy)]
struct Strip {
    first: usize,
    width: usize,
    column: usize,
}

impl Strip {
    /// This strip of a panel; nothing where there is no token.
    #[inline(always)]
    fn of<'a, T>(&self, panel: &'a [T]) -> &'a [[T; LANES]] {
        chunks(panel).get(self.first * PANEL..(self.first + self.width) * PANEL).unwrap_or_default()
    }
}

#[inline(always)]
fn sum<V: Wide, T: Number, const R: usize, const C: usize>(
    tile: &Weighed<'_, T, R>,
    strip: Strip,
    whole: bool,
    ask: bool,
    sums: &mut [[f32; LANES]],
) {
    match (whole, ask) {
        (true, true) => V::apart(Sum::<T, R, C, true, true> { tile, strip, sums }),
        (true, false) => V::apart(Sum::<T, R, C, true, false> { tile, strip, sums }),
        (false, _) => V::apart(Sum::<T, R, C, false, false> { tile, strip, sums }),
    }
}

/// Adds C of a strip's chunks, from its `column` on, to each row's sums. Whether panels are whole and there is something to
/// ask for is known beforehand.
struct Sum<'a, T, const R: usize, const C: usize, const WHOLE: bool, const ASK: bool> {
    tile: &'a Weighed<'a, T, R>,
    strip: Strip,
    sums: &'a mut [[f32; LANES]],
}

impl<T: Number, const R: usize, const C: usize, const WHOLE: bool, const ASK: bool> Run
    for Sum<'_, T, R, C, WHOLE, ASK>
{
    type Output = ();

    /// Goes through the panels side by side, as scores do: each is a run of memory that the processor reads ahead in, and
    /// several keep more of it under way than one.
    #[inline(always)]
    fn run<V: Wide>(self) {
        let Self { tile: &Weighed { weights, values, ref tokens, next, stride }, mut strip, sums: rows } = self;
        if C == STRIP_CHUNKS {
            // Known when this is compiled, where all of a strip is summed at once.
            (strip.width, strip.column) = (C, 0);
        }
        let Strip { first, width, column } = strip;
        let (mut strips, mut ahead) = ([&[][..]; TILE_PANELS], [&[][..]; TILE_PANELS]);
        for panel in 0..TILE_PANELS {
            strips[panel] = strip.of(values[panel]);
            ahead[panel] = strip.of(known(next[panel], values[panel]));
            if WHOLE {
                // Cut to one length, which the compiler then knows.
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
                if !WHOLE && token >= tokens[panel] {
                    continue;
                }
                let at = token * width + column;
                let mut row = [V::splat(0.0); C];
                for c in 0..C {
                    row[c] = T::load(&strips[panel][at + c]);
                    if ASK {
                        ask(at + c, &ahead[panel][at + c]);
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
