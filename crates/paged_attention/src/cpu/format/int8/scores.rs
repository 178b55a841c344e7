//! Scores of a tile: queries times keys, as integers.
// Loops over all registers are unrolled when their bounds are constants, and only then stay registers.
#![allow(clippy::needless_range_loop)]

use super::{Q_SHIFT, Quad, Rows, ahead, parts, scales_of};
use crate::cpu::arch::prefetch::prefetch;
use crate::cpu::format::ROWS;
use crate::cpu::kernel::Run;
use crate::cpu::tile::{Panels, Scores, TILE_PANELS};
use crate::cpu::wide::{LANES, Wide};

/// Panels side by side, where the registers hold their sums.
const PAIR: usize = 2;

/// The scores of a tile's panels that have tokens, for R rows of a group, from its row `first` on.
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
        let ahead = [ahead(next, panel, keys[0]), ahead(next, panel + 1, keys[1])];
        if V::INT_COLUMNS == PAIR && keys.iter().all(|keys| !keys.is_empty()) {
            V::apart(Product::<R, PAIR> { q, scales, offsets, first, keys, ahead, panel, scores });
            continue;
        }
        for (i, (keys, ahead)) in keys.into_iter().zip(ahead).enumerate().filter(|(_, (keys, _))| !keys.is_empty()) {
            let (keys, ahead, panel) = ([keys], [ahead], panel + i);
            V::apart(Product::<R, 1> { q, scales, offsets, first, keys, ahead, panel, scores });
        }
    }
}

/// The scores of C panels, each score two sums of integers: those of the queries' high bytes and those of the low ones.
struct Product<'a, 's, const R: usize, const C: usize> {
    q: &'a [[Quad<i8>; ROWS]],
    scales: &'a [f32; ROWS],
    offsets: &'a [i32; ROWS],
    first: usize,
    keys: [&'a [u8]; C],
    /// As many lines, to be asked for.
    ahead: [&'a [[u8; 4 * LANES]]; C],
    /// The panel whose scores come first.
    panel: usize,
    scores: &'s mut [Scores; R],
}

impl<const R: usize, const C: usize> Run for Product<'_, '_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        let steps = self.q.len();
        let (mut quads, mut ahead) = ([&[][..]; C], [&[][..]; C]);
        for c in 0..C {
            quads[c] = &parts(self.keys[c]).0[..steps];
            ahead[c] = &self.ahead[c][..steps];
        }
        let [mut high, mut low] = [[[V::no_ints(); C]; R]; 2];
        for step in 0..steps {
            for c in 0..C {
                prefetch(&ahead[c][step]);
                let keys = V::load_quads(&quads[c][step]);
                for r in 0..R {
                    let [by_high, by_low] = self.q[step][(self.first + r) % ROWS];
                    high[r][c] = V::dot_unsigned(high[r][c], keys, by_high);
                    low[r][c] = V::dot_unsigned(low[r][c], keys, by_low);
                }
            }
        }
        for c in 0..C {
            let scales = scales_of::<V>(parts(self.keys[c]).1);
            for r in 0..R {
                let row = (self.first + r) % ROWS;
                let sum = V::floats(V::combine::<Q_SHIFT>(high[r][c], low[r][c], self.offsets[row]));
                let scores = &mut self.scores[r][self.panel + c];
                sum.mul(V::splat(self.scales[row])).mul(scales).store(scores);
            }
        }
    }
}
