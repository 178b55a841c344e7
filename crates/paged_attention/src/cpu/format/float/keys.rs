//! Accumulates a tile whose values are in its keys.
//!
//! A strip of the keys at a time is transposed, as f32, into a buffer that fits the processor's first cache. There all
//! rows read it.

use std::array::from_fn;

use block_pool::PANEL;

use super::sums::{self, STRIP_VECTORS};
use super::vectors;
use crate::cpu::format::{Number, ROWS};
use crate::cpu::panels::{Panels, Scores, TILE_PANELS};
use crate::cpu::wide::{LANES, Run, Wide};

/// Vectors of a panel's strip.
const STRIP_PANEL: usize = PANEL * STRIP_VECTORS;

/// `sums (rows, dims) += weights (rows, tokens) values (tokens, dims)` for the first `tokens` of a tile, where the
/// values are the first dimensions of `keys`.
#[inline(always)]
pub(super) fn accumulate<V: Wide, T: Number>(
    weights: &[Scores],
    tokens: usize,
    keys: &Panels<'_, T>,
    sums: &mut [[f32; LANES]],
    buffer: &mut Vec<[f32; LANES]>,
) {
    let stride = sums.len() / weights.len();
    buffer.resize(TILE_PANELS * STRIP_PANEL, [0.0; LANES]);
    for first in (0..stride).step_by(STRIP_VECTORS) {
        let width = STRIP_VECTORS.min(stride - first);
        for (keys, strip) in keys.iter().zip(buffer.chunks_exact_mut(STRIP_PANEL)) {
            V::outlined(Transpose { keys, first, width, strip });
        }
        let strip: Panels<'_, f32> = from_fn(|panel| match keys[panel].is_empty() {
            true => &[],
            false => buffer[panel * STRIP_PANEL..][..PANEL * width].as_flattened(),
        });
        for (weights, sums) in weights.chunks(ROWS).zip(sums.chunks_mut(ROWS * stride)) {
            by_rows!(weights.len(), N => sums::strip::<V, N>(weights, tokens, &strip, first, width, sums));
        }
    }
}

/// Transposes `width` vectors of the dimensions of a panel's keys, from vector `first` on: `strip (tokens, width, 16)`.
struct Transpose<'a, T> {
    /// `(dims, tokens)`, empty if the panel has no token.
    keys: &'a [T],
    first: usize,
    width: usize,
    strip: &'a mut [[f32; LANES]],
}

impl<T: Number> Run for Transpose<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        for vector in 0..self.width {
            let dims = vectors(self.keys).get((self.first + vector) * LANES..).unwrap_or_default();
            let mut rows = [V::splat(0.0); LANES];
            match dims.first_chunk::<LANES>() {
                Some(dims) => rows = from_fn(|dim| T::load(&dims[dim])),
                // The last vector of the values can end beyond the keys.
                None => rows.iter_mut().zip(dims).for_each(|(row, dim)| *row = T::load(dim)),
            }
            for (token, row) in square(rows).into_iter().enumerate() {
                row.store(&mut self.strip[token * self.width + vector]);
            }
        }
    }
}

/// The transpose of a square of sixteen rows: four rounds, each of which interleaves row `i` with row `i + 8`.
#[inline(always)]
fn square<V: Wide>(mut rows: [V; LANES]) -> [V; LANES] {
    for _ in 0..LANES.ilog2() {
        let pairs: [[V; 2]; LANES / 2] = from_fn(|i| rows[i].interleave(rows[i + LANES / 2]));
        rows = from_fn(|i| pairs[i / 2][i % 2]);
    }
    rows
}
