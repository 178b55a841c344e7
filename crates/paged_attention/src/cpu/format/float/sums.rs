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

/// The same strip of each panel, `(panels, tokens, chunks of a strip)`; empty where there is no token.
type Strips<'a, T> = [&'a [[T; LANES]]; TILE_PANELS];

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
    let tokens = from_fn(|panel| if values[panel].is_empty() { 0 } else { count(panel) });
    for first in (0..stride).step_by(STRIP_CHUNKS) {
        let width = STRIP_CHUNKS.min(stride - first);
        let strips = from_fn(|panel| strip(values[panel], first, width));
        let next = next.map(|next| from_fn(|panel| strip(known(next[panel], values[panel]), first, width)));
        let part = Part { weights, tokens, strips, stride };
        if V::COLUMNS == STRIP_CHUNKS && width == STRIP_CHUNKS {
            part.sum::<V, STRIP_CHUNKS>(next, STRIP_CHUNKS, 0, &mut sums[first..]);
        } else {
            (0..width).for_each(|column| part.sum::<V, 1>(next, width, column, &mut sums[first + column..]));
        }
    }
}

/// The chunks from `first` on of each value in a panel, `width` of them: one strip, or nothing where there is no token.
#[inline(always)]
fn strip<T>(panel: &[T], first: usize, width: usize) -> &[[T; LANES]] {
    chunks(panel).get(first * PANEL..(first + width) * PANEL).unwrap_or_default()
}

/// One strip of a tile's values, and their weights.
#[derive(Clone, Copy)]
struct Part<'a, T, const R: usize> {
    weights: &'a [Scores; R],
    /// How many of each panel's tokens there are.
    tokens: [usize; TILE_PANELS],
    strips: Strips<'a, T>,
    /// Chunks of a row of sums.
    stride: usize,
}

impl<'a, T: Number, const R: usize> Part<'a, T, R> {
    /// Adds C of the strip's `width` chunks, from `column` on, to the first C of each row of sums. Asks for `next`.
    #[inline(always)]
    fn sum<V: Wide, const C: usize>(
        self,
        next: Option<Strips<'a, T>>,
        width: usize,
        column: usize,
        sums: &mut [[f32; LANES]],
    ) {
        let (part, ahead) = (self, next.unwrap_or(self.strips));
        let whole = self.tokens.iter().all(|&tokens| tokens == PANEL);
        match (whole, next) {
            (true, Some(_)) => V::apart(Sum::<T, R, C, true, true> { part, next: ahead, width, column, sums }),
            (true, None) => V::apart(Sum::<T, R, C, true, false> { part, next: ahead, width, column, sums }),
            (false, _) => V::apart(Sum::<T, R, C, false, false> { part, next: ahead, width, column, sums }),
        }
    }
}

/// Some columns of a strip; whether its panels are whole and there is something to ask for is known beforehand.
struct Sum<'a, 's, T, const R: usize, const C: usize, const WHOLE: bool, const ASK: bool> {
    part: Part<'a, T, R>,
    next: Strips<'a, T>,
    width: usize,
    column: usize,
    sums: &'s mut [[f32; LANES]],
}

impl<T: Number, const R: usize, const C: usize, const WHOLE: bool, const ASK: bool> Run
    for Sum<'_, '_, T, R, C, WHOLE, ASK>
{
    type Output = ();

    /// Goes through the panels side by side, as scores do: each is a run of memory that the processor reads ahead in, and
    /// several keep more of it under way than one.
    #[inline(always)]
    fn run<V: Wide>(self) {
        let Part { weights, tokens, mut strips, stride } = self.part;
        // Known when this is compiled, where all of a strip is summed at once.
        let (width, column) = if C == STRIP_CHUNKS { (C, 0) } else { (self.width, self.column) };
        let mut next = self.next;
        if WHOLE {
            // Cut to one length, which the compiler then knows.
            for panel in 0..TILE_PANELS {
                strips[panel] = &strips[panel][..PANEL * width];
                next[panel] = &next[panel][..PANEL * width];
            }
        }
        let mut sums = [[V::splat(0.0); C]; R];
        for r in 0..R {
            for c in 0..C {
                sums[r][c] = V::load(&self.sums[r * stride + c]);
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
                        ask(at + c, &next[panel][at + c]);
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
            for c in 0..C {
                sums[r][c].store(&mut self.sums[r * stride + c]);
            }
        }
    }
}
