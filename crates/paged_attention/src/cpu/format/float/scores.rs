//! Scores of a tile: queries times keys.
// Loops over all registers are unrolled when their bounds are constants, and only then stay registers.
#![allow(clippy::needless_range_loop)]

use std::array::from_fn;

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
    let panels: [_; TILE_PANELS] = from_fn(|panel| chunks(keys[panel]));
    let next: Option<[_; TILE_PANELS]> = next.map(|next| from_fn(|panel| chunks(known(next[panel], keys[panel]))));
    if V::COLUMNS == TILE_PANELS && panels.iter().all(|panel| !panel.is_empty()) {
        match next {
            Some(next) => V::apart(Product::<T, R, TILE_PANELS, true> { q, keys: panels, next, first: 0, scores }),
            None => V::apart(Product::<T, R, TILE_PANELS, false> { q, keys: panels, next: panels, first: 0, scores }),
        }
        return;
    }
    for first in (0..TILE_PANELS).filter(|&panel| !panels[panel].is_empty()) {
        let keys = [panels[first]];
        match next {
            Some(next) => V::apart(Product::<T, R, 1, true> { q, keys, next: [next[first]], first, scores }),
            None => V::apart(Product::<T, R, 1, false> { q, keys, next: keys, first, scores }),
        }
    }
}

/// `scores (R, C x 16) = q (R, head_dim) keys (head_dim, C x 16)`, each sum one chain of multiply-adds, whatever R and C
/// are. Asks for `next`, as large as `keys`, at a steady pace: requests in bursts are dropped.
struct Product<'a, 's, T, const R: usize, const C: usize, const ASK: bool> {
    q: &'a [[f32; ROWS]],
    keys: [&'a [[T; LANES]]; C],
    next: [&'a [[T; LANES]]; C],
    /// The panel whose scores come first.
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
            keys[c] = &self.keys[c].as_chunks::<2>().0[..pairs.len()];
            next[c] = &self.next[c].as_chunks::<2>().0[..pairs.len()];
        }
        for pair in 0..pairs.len() {
            for half in 0..2 {
                let mut row = [V::splat(0.0); C];
                for c in 0..C {
                    row[c] = T::load(&keys[c][pair][half]);
                    if ASK {
                        ask(half, &next[c][pair][half]);
                    }
                }
                add(&mut sums, &pairs[pair][half], row);
            }
        }
        if let [q] = last {
            add(&mut sums, q, self.keys.map(|keys| T::load(&keys[self.q.len() - 1])));
        }
        for r in 0..R {
            for c in 0..C {
                sums[r][c].store(&mut self.scores[r][self.first + c]);
            }
        }
    }
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
