//! Scores of a tile: `q kᵀ`.
// Loops over arrays of vectors have constant bounds, so that they are unrolled: only then the arrays stay in registers.
#![allow(clippy::needless_range_loop)]

use super::{or_current, prefetch_vector, vectors};
use crate::cpu::format::{Number, ROWS};
use crate::cpu::panels::{Panels, Scores, TILE_PANELS};
use crate::cpu::wide::{LANES, Run, Wide};

/// The scores of a tile's panels that have tokens, for R rows. All panels at once if the registers can hold their
/// accumulators and no panel is empty, otherwise one at a time.
#[inline(always)]
pub(super) fn tile<V: Wide, T: Number, const R: usize>(
    q: &[[f32; ROWS]],
    keys: &Panels<'_, T>,
    next: Option<&Panels<'_, T>>,
    scores: &mut [Scores],
) {
    let Some(scores) = scores.first_chunk_mut::<R>() else { return };
    if V::COLUMNS == TILE_PANELS && keys.iter().all(|panel| !panel.is_empty()) {
        product::<V, T, R, TILE_PANELS>(q, keys, next, 0, scores);
    } else {
        for first in (0..TILE_PANELS).filter(|&panel| !keys[panel].is_empty()) {
            product::<V, T, R, 1>(q, keys, next, first, scores);
        }
    }
}

#[inline(always)]
fn product<V: Wide, T: Number, const R: usize, const C: usize>(
    q: &[[f32; ROWS]],
    keys: &Panels<'_, T>,
    next: Option<&Panels<'_, T>>,
    first: usize,
    scores: &mut [Scores; R],
) {
    match next {
        Some(next) => V::outlined(Product::<T, R, C, true> { q, keys, next, first, scores }),
        None => V::outlined(Product::<T, R, C, false> { q, keys, next: keys, first, scores }),
    }
}

/// `scores (R, C x 16) = q (R, head_dim) keys (head_dim, C x 16)`. Each sum is one chain of multiply-adds, whatever R
/// and C are. Prefetches `next`, which has the size of `keys`, evenly spread over the loop: the processor drops
/// prefetches that come in bursts.
struct Product<'a, 's, T, const R: usize, const C: usize, const PREFETCH: bool> {
    q: &'a [[f32; ROWS]],
    keys: &'a Panels<'a, T>,
    next: &'a Panels<'a, T>,
    /// The first of C panels.
    first: usize,
    scores: &'s mut [Scores; R],
}

impl<T: Number, const R: usize, const C: usize, const PREFETCH: bool> Run for Product<'_, '_, T, R, C, PREFETCH> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        let mut sums = [[V::splat(0.0); C]; R];
        // Two dimensions at a time: with 16-bit numbers that is one cache line. All slices are cut to one length, so
        // that no bounds are checked in the loop.
        let (pairs, last) = self.q.as_chunks::<2>();
        let (mut keys, mut next) = ([&[][..]; C], [&[][..]; C]);
        for c in 0..C {
            let current = self.keys[self.first + c];
            keys[c] = &pairs_of(current)[..pairs.len()];
            next[c] = &pairs_of(or_current(self.next[self.first + c], current))[..pairs.len()];
        }
        for pair in 0..pairs.len() {
            for half in 0..2 {
                let mut row = [V::splat(0.0); C];
                for c in 0..C {
                    row[c] = T::load(&keys[c][pair][half]);
                    if PREFETCH {
                        prefetch_vector(2 * pair + half, &next[c][pair][half]);
                    }
                }
                add(&mut sums, &pairs[pair][half], row);
            }
        }
        if let [q] = last {
            let mut row = [V::splat(0.0); C];
            for c in 0..C {
                row[c] = T::load(&vectors(self.keys[self.first + c])[self.q.len() - 1]);
            }
            add(&mut sums, q, row);
        }
        for r in 0..R {
            for c in 0..C {
                sums[r][c].store(&mut self.scores[r][self.first + c]);
            }
        }
    }
}

/// A panel's keys, in pairs of dimensions.
#[inline(always)]
fn pairs_of<T>(panel: &[T]) -> &[[[T; LANES]; 2]] {
    vectors(panel).as_chunks().0
}

/// Adds `q[r] * row` to the sums of each row `r`.
#[inline(always)]
fn add<V: Wide, const R: usize, const C: usize>(sums: &mut [[V; C]; R], q: &[f32; ROWS], row: [V; C]) {
    for r in 0..R {
        let x = V::splat(q[r]);
        for c in 0..C {
            sums[r][c] = x.multiply_add(row[c], sums[r][c]);
        }
    }
}
