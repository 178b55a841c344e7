//! Scores of a tile: `q kᵀ`, as integers.
// Loops over arrays of vectors have constant bounds, so that they are unrolled: only then the arrays stay in registers.
#![allow(clippy::needless_range_loop)]

use super::{Q_SHIFT, Quad, Rows, lines_to_prefetch, scales_of, split_scales};
use crate::cpu::arch::prefetch::prefetch;
use crate::cpu::format::ROWS;
use crate::cpu::panels::{Panels, Scores, TILE_PANELS};
use crate::cpu::wide::{LANES, Run, Wide};

/// Panels that are computed at once if the registers can hold their sums.
const PAIR: usize = 2;

/// The scores of a tile's panels that have tokens, for R rows of a group, from row `first` of the group on.
#[inline(always)]
pub(super) fn tile<V: Wide, const R: usize>(
    queries: &Rows,
    group: usize,
    first: usize,
    keys: &Panels<'_, u8>,
    next: Option<&Panels<'_, u8>>,
    scores: &mut [Scores],
) {
    let Some(scores) = scores.first_chunk_mut::<R>() else { return };
    let steps = queries.quads.len() / queries.scales.len();
    let q = &queries.quads[group * steps..][..steps];
    let (scales, offsets) = (&queries.scales[group], &queries.offsets[group]);
    for panel in (0..TILE_PANELS).step_by(PAIR) {
        let keys = [keys[panel], keys[panel + 1]];
        let lines = [lines_to_prefetch(next, panel, keys[0]), lines_to_prefetch(next, panel + 1, keys[1])];
        if V::INT_COLUMNS == PAIR && keys.iter().all(|keys| !keys.is_empty()) {
            V::outlined(Product::<R, PAIR> { q, scales, offsets, first, keys, lines, panel, scores });
            continue;
        }
        for (i, (keys, lines)) in keys.into_iter().zip(lines).enumerate().filter(|(_, (keys, _))| !keys.is_empty()) {
            let (keys, lines, panel) = ([keys], [lines], panel + i);
            V::outlined(Product::<R, 1> { q, scales, offsets, first, keys, lines, panel, scores });
        }
    }
}

/// The scores of C panels. Each score is made of two sums of integers: one of products with the query's high bytes, one
/// of products with its low bytes.
struct Product<'a, 's, const R: usize, const C: usize> {
    q: &'a [[Quad<i8>; ROWS]],
    scales: &'a [f32; ROWS],
    offsets: &'a [i32; ROWS],
    first: usize,
    keys: [&'a [u8]; C],
    /// Cache lines to prefetch, as many as `keys` has.
    lines: [&'a [[u8; 4 * LANES]]; C],
    /// The index of the first of the C panels.
    panel: usize,
    scores: &'s mut [Scores; R],
}

impl<const R: usize, const C: usize> Run for Product<'_, '_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        let steps = self.q.len();
        let (mut quads, mut lines) = ([&[][..]; C], [&[][..]; C]);
        for c in 0..C {
            quads[c] = &split_scales(self.keys[c]).0[..steps];
            lines[c] = &self.lines[c][..steps];
        }
        let [mut high, mut low] = [[[V::zero_ints(); C]; R]; 2];
        for step in 0..steps {
            for c in 0..C {
                prefetch(&lines[c][step]);
                let keys = V::load_quads(&quads[c][step]);
                for r in 0..R {
                    let [by_high, by_low] = self.q[step][(self.first + r) % ROWS];
                    high[r][c] = V::dot_unsigned(high[r][c], keys, by_high);
                    low[r][c] = V::dot_unsigned(low[r][c], keys, by_low);
                }
            }
        }
        for c in 0..C {
            let scales = scales_of::<V>(split_scales(self.keys[c]).1);
            for r in 0..R {
                let row = (self.first + r) % ROWS;
                let sum = V::from_ints(V::combine::<Q_SHIFT>(high[r][c], low[r][c], self.offsets[row]));
                let scores = &mut self.scores[r][self.panel + c];
                sum.mul(V::splat(self.scales[row])).mul(scales).store(scores);
            }
        }
    }
}
