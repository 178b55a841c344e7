//! Keys and values as f32, f16 or bf16. Arithmetic is in f32; numbers are widened as they are loaded.

use std::marker::PhantomData;

use block_pool::{KvLayout, PANEL};
use half::{bf16, f16};

use super::{Format, Group, ROWS, Space};
use crate::cpu::arch::prefetch::prefetch;
use crate::cpu::tile::{Panels, Scores, TILE_PANELS};
use crate::cpu::wide::{LANES, Wide};

/// A floating point number, as a caller gives it or as it is stored.
pub(in crate::cpu) trait Number: Copy + Default + Send + Sync + 'static {
    fn widen(self) -> f32;
    fn narrow(x: f32) -> Self;
    fn load<V: Wide>(from: &[Self; LANES]) -> V;
}

impl Number for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn load<V: Wide>(from: &[Self; LANES]) -> V {
        V::load(from)
    }
}

impl Number for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }

    #[inline(always)]
    fn load<V: Wide>(from: &[Self; LANES]) -> V {
        V::load_f16(from)
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }

    #[inline(always)]
    fn load<V: Wide>(from: &[Self; LANES]) -> V {
        V::load_bf16(from)
    }
}

/// Numbers as they are.
pub(in crate::cpu) struct Float<T>(PhantomData<T>);

/// Query rows, four by four.
#[derive(Default)]
pub(in crate::cpu) struct Rows {
    /// `(groups, head_dim, 4)`: a step of a product finds its four side by side.
    numbers: Vec<[f32; ROWS]>,
    head_dim: usize,
}

impl<T: Number> Format for Float<T> {
    type Number = T;
    type Queries = Rows;

    fn store<S: Number>(layout: &KvLayout, block: &mut [T], offset: usize, head: usize, k: &[S], v: &[S]) {
        // Neighbouring dimensions of a key are as far apart as the panel has tokens.
        let width = PANEL.min(layout.block_size - offset / PANEL * PANEL);
        let keys = block[layout.key(offset, head, 0)..].iter_mut().step_by(width);
        keys.zip(k).for_each(|(to, from)| *to = T::narrow(from.widen()));
        let values = block[layout.value(offset, head, 0)..].iter_mut();
        values.zip(v).for_each(|(to, from)| *to = T::narrow(from.widen()));
    }

    fn load(layout: &KvLayout, block: &[T], offset: usize, head: usize, k: &mut [f32], v: &mut [f32]) {
        for (dim, (k, v)) in k.iter_mut().zip(v).enumerate() {
            *k = block[layout.key(offset, head, dim)].widen();
            *v = block[layout.value(offset, head, dim)].widen();
        }
    }

    fn panel_sizes(head_dim: usize, dims: usize) -> [usize; 2] {
        [head_dim * PANEL, PANEL * dims]
    }

    fn copy(
        layout: &KvLayout,
        block: &[T],
        offset: usize,
        head: usize,
        to: (&mut [T], &mut [T]),
        at: usize,
        dims: usize,
    ) {
        let width = PANEL.min(layout.block_size - offset / PANEL * PANEL);
        let keys = block[layout.key(offset, head, 0)..].iter().step_by(width);
        let (columns, _) = to.0.as_chunks_mut::<PANEL>();
        columns.iter_mut().zip(keys).for_each(|(to, from)| to[at] = *from);
        let values = &block[layout.value(offset, head, 0)..][..layout.head_dim];
        to.1[at * dims..][..layout.head_dim].copy_from_slice(values);
    }

    fn prepare<'a>(queries: &mut Rows, groups: impl Iterator<Item = Group<'a>>, factor: f32) {
        queries.numbers.clear();
        for group in groups {
            queries.head_dim = group[0].len();
            let step = |dim: usize| group.map(|row| row.get(dim).map_or(0.0, |x| x * factor));
            queries.numbers.extend((0..queries.head_dim).map(step));
        }
    }

    #[inline(always)]
    fn scores<V: Wide>(
        queries: &Rows,
        group: usize,
        keys: &Panels<'_, T>,
        next: Option<&Panels<'_, T>>,
        scores: &mut [Scores],
    ) {
        let q = &queries.numbers[group * queries.head_dim..][..queries.head_dim];
        match scores.len() {
            1 => tile_scores::<V, T, 1>(q, keys, next, scores),
            2 => tile_scores::<V, T, 2>(q, keys, next, scores),
            3 => tile_scores::<V, T, 3>(q, keys, next, scores),
            _ => tile_scores::<V, T, ROWS>(q, keys, next, scores),
        }
    }

    #[inline(always)]
    fn weigh<V: Wide>(
        weights: &[Scores],
        tokens: usize,
        values: &Panels<'_, T>,
        next: Option<&Panels<'_, T>>,
        sums: &mut [[f32; LANES]],
        _: &mut Space,
    ) {
        match weights.len() {
            1 => tile_sums::<V, T, 1>(weights, tokens, values, next, sums),
            2 => tile_sums::<V, T, 2>(weights, tokens, values, next, sums),
            3 => tile_sums::<V, T, 3>(weights, tokens, values, next, sums),
            _ => tile_sums::<V, T, ROWS>(weights, tokens, values, next, sums),
        }
    }
}

/// A run of numbers, sixteen by sixteen.
#[inline(always)]
fn chunks<T>(run: &[T]) -> &[[T; LANES]] {
    run.as_chunks().0
}

/// Asks for some neighbouring chunks, one request for each line of memory.
#[inline(always)]
fn ask<T, const C: usize>(at: usize, chunks: [&[T; LANES]; C]) {
    const LINE: usize = 64;
    let chunks_per_line = LINE / size_of::<[T; LANES]>();
    for (c, chunk) in chunks.into_iter().enumerate() {
        if (at + c).is_multiple_of(chunks_per_line) {
            prefetch(chunk);
        }
    }
}

/// The scores of a tile, panels side by side where the registers hold their sums.
#[inline(always)]
fn tile_scores<V: Wide, T: Number, const R: usize>(
    q: &[[f32; ROWS]],
    keys: &Panels<'_, T>,
    next: Option<&Panels<'_, T>>,
    scores: &mut [Scores],
) {
    let panels = keys.map(chunks);
    // Where nothing is known of what comes next, what is here already is asked for: that costs least.
    let next = next.map(|next| {
        let known = |panel: usize| if next[panel].is_empty() { panels[panel] } else { chunks(next[panel]) };
        std::array::from_fn::<_, TILE_PANELS, _>(known)
    });
    if V::COLUMNS == TILE_PANELS && panels.iter().all(|panel| !panel.is_empty()) {
        let sums: [[V; TILE_PANELS]; R] = match next {
            Some(next) => products::<V, T, R, TILE_PANELS, true>(q, panels, next),
            None => products::<V, T, R, TILE_PANELS, false>(q, panels, panels),
        };
        for r in 0..R {
            for panel in 0..TILE_PANELS {
                sums[r][panel].store(&mut scores[r][panel]);
            }
        }
        return;
    }
    for panel in (0..TILE_PANELS).filter(|&panel| !panels[panel].is_empty()) {
        let keys = [panels[panel]];
        let sums: [[V; 1]; R] = match next {
            Some(next) => products::<V, T, R, 1, true>(q, keys, [next[panel]]),
            None => products::<V, T, R, 1, false>(q, keys, keys),
        };
        for r in 0..R {
            sums[r][0].store(&mut scores[r][panel]);
        }
    }
}

/// `q (R, head_dim) keys (head_dim, C x 16)`, each sum one chain of multiply-adds, whatever R and C are. Asks for `next`, as
/// large as `keys`, at a steady pace: requests in bursts are dropped.
#[inline(always)]
fn products<V: Wide, T: Number, const R: usize, const C: usize, const ASK: bool>(
    q: &[[f32; ROWS]],
    keys: [&[[T; LANES]]; C],
    next: [&[[T; LANES]]; C],
) -> [[V; C]; R] {
    let steps = q.len();
    let (keys, next) = (keys.map(|keys| &keys[..steps]), next.map(|next| &next[..steps]));
    let mut sums = [[V::splat(0.0); C]; R];
    for step in 0..steps {
        let mut row = [V::splat(0.0); C];
        for c in 0..C {
            row[c] = T::load(&keys[c][step]);
            if ASK {
                ask(step, [&next[c][step]]);
            }
        }
        for r in 0..R {
            let x = V::splat(q[step][r]);
            for c in 0..C {
                sums[r][c] = x.multiply_add(row[c], sums[r][c]);
            }
        }
    }
    sums
}

/// The weighted sums of a tile's values, dimensions side by side where the registers hold their sums.
#[inline(always)]
fn tile_sums<V: Wide, T: Number, const R: usize>(
    weights: &[Scores],
    tokens: usize,
    values: &Panels<'_, T>,
    next: Option<&Panels<'_, T>>,
    sums: &mut [[f32; LANES]],
) {
    let Some(weights) = weights.first_chunk::<R>() else { return };
    let stride = sums.len() / R;
    let wide = if V::COLUMNS == 4 { stride / 4 * 4 } else { 0 };
    for at in (0..wide).step_by(4) {
        match next {
            Some(next) => part_of_sums::<V, T, R, 4, true>(weights, tokens, values, next, sums, at),
            None => part_of_sums::<V, T, R, 4, false>(weights, tokens, values, values, sums, at),
        }
    }
    for at in wide..stride {
        match next {
            Some(next) => part_of_sums::<V, T, R, 1, true>(weights, tokens, values, next, sums, at),
            None => part_of_sums::<V, T, R, 1, false>(weights, tokens, values, values, sums, at),
        }
    }
}

/// `sums (R, C x 16) += weights (R, tokens) values (tokens, C x 16)` for the chunks of a value from `at` on.
#[inline(always)]
fn part_of_sums<V: Wide, T: Number, const R: usize, const C: usize, const ASK: bool>(
    weights: &[Scores; R],
    tokens: usize,
    values: &Panels<'_, T>,
    next: &Panels<'_, T>,
    sums: &mut [[f32; LANES]],
    at: usize,
) {
    let stride = sums.len() / R;
    let mut part = [[V::splat(0.0); C]; R];
    for r in 0..R {
        for c in 0..C {
            part[r][c] = V::load(&sums[r * stride + at + c]);
        }
    }
    for panel in (0..TILE_PANELS).filter(|&panel| !values[panel].is_empty()) {
        let next = if next[panel].is_empty() { values[panel] } else { next[panel] };
        let rows = chunks(values[panel]).chunks_exact(stride).zip(chunks(next).chunks_exact(stride));
        // Slots behind the last token hold anything, NaN included: they are not read.
        let tokens = PANEL.min(tokens - (panel * PANEL).min(tokens));
        for (token, (values, next)) in rows.enumerate().take(tokens) {
            let (Some(values), Some(next)) = (values[at..].first_chunk::<C>(), next[at..].first_chunk::<C>()) else {
                return;
            };
            if ASK {
                ask(at, next.each_ref());
            }
            let mut row = [V::splat(0.0); C];
            for c in 0..C {
                row[c] = T::load(&values[c]);
            }
            for r in 0..R {
                let x = V::splat(weights[r][panel][token % PANEL]);
                for c in 0..C {
                    part[r][c] = x.multiply_add(row[c], part[r][c]);
                }
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            part[r][c].store(&mut sums[r * stride + at + c]);
        }
    }
}
