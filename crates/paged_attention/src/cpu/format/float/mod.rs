//! Keys and values as f32, f16 or bf16. Arithmetic is in f32: numbers are converted when they are loaded.

mod keys;
mod scores;
mod sums;

use std::array::from_fn;
use std::marker::PhantomData;

use block_pool::{KvLayout, PANEL, STRIP};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::{Buffers, Format, ROWS};
use crate::cpu::arch::prefetch::prefetch;
use crate::cpu::panels::{Panels, Scores};
use crate::cpu::wide::{LANES, Wide};

/// A floating point type of queries, keys and values.
pub(in crate::cpu) trait Number: Copy + Default + Send + Sync + 'static {
    fn widen(from: &[Self], to: &mut [f32]);
    fn narrow(from: &[f32], to: &mut [Self]);
    fn load<V: Wide>(from: &[Self; LANES]) -> V;
}

impl Number for f32 {
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }

    #[inline(always)]
    fn load<V: Wide>(from: &[Self; LANES]) -> V {
        V::load(from)
    }
}

/// The two types of 16 bits.
macro_rules! half_number {
    ($number:ty, $load:ident) => {
        impl Number for $number {
            fn widen(from: &[Self], to: &mut [f32]) {
                from.convert_to_f32_slice(to);
            }

            fn narrow(from: &[f32], to: &mut [Self]) {
                to.convert_from_f32_slice(from);
            }

            #[inline(always)]
            fn load<V: Wide>(from: &[Self; LANES]) -> V {
                V::$load(from)
            }
        }
    };
}

half_number!(f16, load_f16);
half_number!(bf16, load_bf16);

/// Storage as floats of type `T`.
pub(in crate::cpu) struct Float<T>(PhantomData<T>);

/// Query rows, packed in groups of four.
#[derive(Default)]
pub(in crate::cpu) struct Rows {
    /// `(groups, head_dim, 4)`: the four numbers that one step of a product reads are adjacent.
    numbers: Vec<[f32; ROWS]>,
    head_dim: usize,
}

impl<T: Number> Format for Float<T> {
    type Number = T;
    type Queries = Rows;

    fn store(layout: &KvLayout, block: &mut [T], offset: usize, head: usize, k: &[f32], v: &[f32]) {
        // Keys are transposed: the stride between two dimensions of a key is the number of tokens in its panel.
        let width = PANEL.min(layout.block_size - offset / PANEL * PANEL);
        let mut keys = block[layout.key(offset, head, 0)..].iter_mut().step_by(width);
        let mut narrow = [T::default(); STRIP];
        for k in k.chunks(STRIP) {
            T::narrow(k, &mut narrow[..k.len()]);
            narrow[..k.len()].iter().zip(&mut keys).for_each(|(from, to)| *to = *from);
        }
        for (strip, v) in v.chunks(STRIP).enumerate() {
            T::narrow(v, &mut block[layout.value(offset, head, strip * STRIP)..][..v.len()]);
        }
    }

    fn load(layout: &KvLayout, block: &[T], offset: usize, head: usize, k: &mut [f32], v: &mut [f32]) {
        let width = PANEL.min(layout.block_size - offset / PANEL * PANEL);
        let mut keys = block[layout.key(offset, head, 0)..].iter().step_by(width);
        let mut narrow = [T::default(); STRIP];
        for k in k.chunks_mut(STRIP) {
            narrow[..k.len()].iter_mut().zip(&mut keys).for_each(|(to, from)| *to = *from);
            T::widen(&narrow[..k.len()], k);
        }
        if layout.values_in_keys {
            v.copy_from_slice(&k[..layout.value_dim]);
            return;
        }
        for (strip, v) in v.chunks_mut(STRIP).enumerate() {
            T::widen(&block[layout.value(offset, head, strip * STRIP)..][..v.len()], v);
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
        index: usize,
        dims: usize,
    ) {
        let width = PANEL.min(layout.block_size - offset / PANEL * PANEL);
        let keys = block[layout.key(offset, head, 0)..].iter().step_by(width);
        let (columns, _) = to.0.as_chunks_mut::<PANEL>();
        columns.iter_mut().zip(keys).for_each(|(to, from)| to[index] = *from);
        if layout.values_in_keys {
            return;
        }
        let panel_layout = KvLayout { block_size: PANEL, kv_heads: 1, value_dim: dims, ..*layout };
        let values = panel_layout.value_panel(0, 0).start;
        for first in (0..layout.value_dim).step_by(STRIP) {
            let dims_here = STRIP.min(layout.value_dim - first);
            let from = &block[layout.value(offset, head, first)..][..dims_here];
            to.1[panel_layout.value(index, 0, first) - values..][..dims_here].copy_from_slice(from);
        }
    }

    fn clear(queries: &mut Rows) {
        queries.numbers.clear();
    }

    #[inline(always)]
    fn prepare(queries: &mut Rows, rows: &[f32], head_dim: usize, factor: f32) {
        queries.head_dim = head_dim;
        let mut rows = rows.chunks_exact(head_dim);
        let [a, b, c, d] = from_fn(|_| rows.next().unwrap_or_default());
        if d.len() == head_dim {
            let rows = a.iter().zip(b).zip(c.iter().zip(d));
            queries.numbers.extend(rows.map(|((a, b), (c, d))| [a, b, c, d].map(|x| x * factor)));
        } else {
            let step = |dim: usize| [a, b, c, d].map(|row| row.get(dim).map_or(0.0, |x| x * factor));
            queries.numbers.extend((0..head_dim).map(step));
        }
    }

    #[inline(always)]
    fn scores<V: Wide>(
        queries: &Rows,
        first: usize,
        keys: &Panels<'_, T>,
        next: Option<&Panels<'_, T>>,
        scores: &mut [Scores],
    ) {
        let groups = queries.numbers[first * queries.head_dim..].chunks_exact(queries.head_dim);
        for (i, (q, rows)) in groups.zip(scores.chunks_mut(ROWS)).enumerate() {
            let next = next.filter(|_| i == 0);
            by_rows!(rows.len(), N => scores::tile::<V, T, N>(q, keys, next, rows));
        }
    }

    #[inline(always)]
    fn accumulate<V: Wide>(
        weights: &[Scores],
        tokens: usize,
        values: &Panels<'_, T>,
        next: Option<&Panels<'_, T>>,
        sums: &mut [[f32; LANES]],
        _: &mut Buffers,
    ) {
        let stride = sums.len() / weights.len();
        for (i, (weights, sums)) in weights.chunks(ROWS).zip(sums.chunks_mut(ROWS * stride)).enumerate() {
            let next = next.filter(|_| i == 0);
            by_rows!(weights.len(), N => sums::tile::<V, T, N>(weights, tokens, values, next, sums));
        }
    }

    #[inline(always)]
    fn accumulate_keys<V: Wide>(
        weights: &[Scores],
        tokens: usize,
        keys: &Panels<'_, T>,
        _: usize,
        sums: &mut [[f32; LANES]],
        buffers: &mut Buffers,
    ) {
        keys::accumulate::<V, T>(weights, tokens, keys, sums, &mut buffers.strip);
    }
}

/// A run of numbers as vectors of sixteen.
#[inline(always)]
fn vectors<T>(run: &[T]) -> &[[T; LANES]] {
    run.as_chunks().0
}

/// Prefetches the vector with index `index` of a run if it begins a cache line, or, with f32, if it begins a 4096-byte
/// page. The hardware prefetcher reads ahead within a page, but not across pages, and with f32 more software prefetches
/// slow it down. With 16-bit numbers they do not (measured).
#[inline(always)]
fn prefetch_vector<T>(index: usize, chunk: &[T; LANES]) {
    let bytes = if size_of::<T>() == size_of::<f32>() { 4096 } else { 64 };
    if index.is_multiple_of(bytes / size_of::<[T; LANES]>()) {
        prefetch(chunk);
    }
}

/// The run to prefetch: `next`, or if it is empty `current`, which is in the cache already, so that the prefetch costs
/// least.
#[inline(always)]
fn or_current<'a, T>(next: &'a [T], current: &'a [T]) -> &'a [T] {
    if next.is_empty() { current } else { next }
}
