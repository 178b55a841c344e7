//! Scores of a tile: queries times keys.
// Loops over all registers are unrolled when their bounds are constants, and only then stay registers.
#![allow(clippy::needless_range_loop)]

use super::{ask, chunks, known};
use crate::cpu::format::{Number, ROWS};
use crate::cpu::kernel::Run;
use crate::cpu::tile::{Panels, Scores, TILE_PANELS};
use crate::cpu::wide::{LANES, Wide};

/// The scores of a tile's panels that have tokens, for R rows. Panels side by side where the registers hold their sums.
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
        Some(next) => V::apart(Product::<T, R, C, true> { q, keys, next, first, scores }),
        None => V::apart(Product::<T, R, C, false> { q, keys, next: keys, first, scores }),
    }
}

/// `scores (R, C x 16) = q (R, head_dim) keys (head_dim, C x 16)`, each sum one chain of multiply-adds, whatever R and C
/// are. Asks for `next`, as large as `keys`, at a steady pace: requests in bursts are dropped.
struct Product<'a, 's, T, const R: usize, const C: usize, const ASK: bool> {
    q: &'a [[f32; ROWS]],
    keys: &'a Panels<'a, T>,
    next: &'a Panels<'a, T>,
    /// The first of C panels.
    first: usize,
    scores: &'s mut [Scores; R],
}

impl<T: Number, const R: usize, const C: usize, const ASK: bool> Run for Product<'_, '_, T, R, C, ASK> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        let mut sums = [[V::splat(0.0); C]; R];
        // Two dimensions at a time: 16-bit numbers then use up a line of memory. All slices are cut to one length, so that
        // there are no bounds to check.
        let (pairs, last) = self.q.as_chunks::<2>();
        let (mut keys, mut next) = ([&[][..]; C], [&[][..]; C]);
        for c in 0..C {
            let here = self.keys[self.first + c];
            keys[c] = &pairs_of(here)[..pairs.len()];
            next[c] = &pairs_of(known(self.next[self.first + c], here))[..pairs.len()];
        }
        for pair in 0..pairs.len() {
            for half in 0..2 {
                let mut row = [V::splat(0.0); C];
                for c in 0..C {
                    row[c] = T::load(&keys[c][pair][half]);
                    if ASK {
                        ask(2 * pair + half, &next[c][pair][half]);
                    }
                }
                add(&mut sums, &pairs[pair][half], row);
            }
        }
        if let [q] = last {
            let mut row = [V::splat(0.0); C];
            for c in 0..C {
                row[c] = T::load(&chunks(self.keys[self.first + c])[self.q.len() - 1]);
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

/// A panel's keys, dimension after dimension, two by two.
#[inline(always)]
fn pairs_of<T>(panel: &[T]) -> &[[[T; LANES]; 2]] {
    chunks(panel).as_chunks().0
}

/// Adds to each row's sums the products of its number and all of `row`.
#[inline(always)]
fn add<V: Wide, const R: usize, const C: usize>(sums: &mut [[V; C]; R], q: &[f32; ROWS], row: [V; C]) {
    for r in 0..R {
        let x = V::splat(q[r]);
        for c in 0..C {
            sums[r][c] = x.multiply_add(row[c], sums[r][c]);
        }
    }
}
