//! Keys and values as bytes with a scale for each token and head, multiplied as integers.
//!
//! A key `k` is stored as `s` and `round(k / s) + 128` with `s = max |k| / 127`, a value as `s` and `round(v / s)`: one side
//! unsigned, one signed, as the instructions for products of bytes want it. Queries and weights, the other sides, are each
//! the sum of two bytes, so that next to nothing is lost by them:
//!
//! ```text
//! q = t (64 high + low)     high from -64 to 64, low from -32 to 31      t = max |q| / 4095
//! p = t (128 high + low)    high and low from 0 to 127                   t = max p / 16383
//! ```
//!
//! The ranges are such that AVX2, which adds two products in 16 bits, has room for them. Sums of integers are exact: the
//! instruction sets differ in nothing.

use block_pool::{KvLayout, PANEL};

use super::{Format, Group, ROWS, Space};
use crate::cpu::arch::prefetch::prefetch;
use crate::cpu::tile::{Panels, Scores, TILE, TILE_PANELS};
use crate::cpu::wide::{LANES, Wide, largest};

/// Keys and values as bytes.
pub(in crate::cpu) struct Int8;

/// The most dimensions for which sums of products cannot overflow.
pub(crate) const MOST_DIMS: usize = 2048;

/// What is added to a key's numbers to make them unsigned.
const OFFSET: i32 = 128;
const Q_SHIFT: i32 = 6;
const Q_LARGEST: f32 = 4095.0;
const P_SHIFT: i32 = 7;
const P_LARGEST: f32 = 16383.0;
/// Bytes of a panel's scales.
const SCALES: usize = PANEL * 4;

/// High bytes and low bytes of four numbers.
type Quad<T> = [[T; 4]; 2];

/// A row's weights of a tile, four tokens by four.
pub(super) type Weights = [Quad<u8>; TILE_PANELS * PANEL / 4];

/// Query rows as integers, four by four.
#[derive(Default)]
pub(in crate::cpu) struct Rows {
    /// `(groups, head_dim / 4, 4)`: a step of a product finds its four rows side by side.
    quads: Vec<[Quad<i8>; ROWS]>,
    /// `(groups, 4)`: what 1 stands for.
    scales: Vec<[f32; ROWS]>,
    /// `(groups, 4)`: the sum of a row's integers, times the offset of keys.
    offsets: Vec<[i32; ROWS]>,
}

/// A scale so that the largest of `xs` becomes `to`, and its inverse.
fn scale(xs: &[f32], to: f32) -> [f32; 2] {
    let largest = xs.iter().fold(0f32, |m, x| if x.abs() > m || x.is_nan() { x.abs() } else { m });
    [largest / to, if largest == 0.0 { 0.0 } else { to / largest }]
}

fn read_scale(bytes: &[u8]) -> f32 {
    bytes.first_chunk().map_or(f32::NAN, |bytes| f32::from_ne_bytes(*bytes))
}

impl Format for Int8 {
    type Number = u8;
    type Queries = Rows;

    fn store(layout: &KvLayout, block: &mut [u8], offset: usize, head: usize, k: &[f32], v: &[f32]) {
        let [k_scale, k_inverse] = scale(k, 127.0);
        let [v_scale, v_inverse] = scale(v, 127.0);
        let byte = |x: f32, inverse: f32| (x * inverse).round_ties_even() as i32;
        for (dim, x) in k.iter().enumerate() {
            block[layout.key(offset, head, dim)] = (byte(*x, k_inverse) + OFFSET) as u8;
        }
        for (dim, x) in v.iter().enumerate() {
            block[layout.value(offset, head, dim)] = byte(*x, v_inverse) as u8;
        }
        block[layout.key_scale(offset, head)].copy_from_slice(&k_scale.to_ne_bytes());
        block[layout.value_scale(offset, head)].copy_from_slice(&v_scale.to_ne_bytes());
    }

    fn load(layout: &KvLayout, block: &[u8], offset: usize, head: usize, k: &mut [f32], v: &mut [f32]) {
        let k_scale = read_scale(&block[layout.key_scale(offset, head)]);
        let v_scale = read_scale(&block[layout.value_scale(offset, head)]);
        for (dim, (k, v)) in k.iter_mut().zip(v).enumerate() {
            *k = (i32::from(block[layout.key(offset, head, dim)]) - OFFSET) as f32 * k_scale;
            *v = f32::from(block[layout.value(offset, head, dim)] as i8) * v_scale;
        }
    }

    fn panel_sizes(head_dim: usize, dims: usize) -> [usize; 2] {
        [head_dim.next_multiple_of(4) * PANEL + SCALES, PANEL * dims + SCALES]
    }

    fn copy(
        layout: &KvLayout,
        block: &[u8],
        offset: usize,
        head: usize,
        to: (&mut [u8], &mut [u8]),
        at: usize,
        dims: usize,
    ) {
        let (keys, values) = to;
        let whole = KvLayout { block_size: PANEL, kv_heads: 1, ..*layout };
        let wide = KvLayout { head_dim: dims, ..whole };
        let first = wide.value_panel(0, 0).start;
        for dim in 0..layout.head_dim {
            keys[whole.key(at, 0, dim)] = block[layout.key(offset, head, dim)];
            values[wide.value(at, 0, dim) - first] = block[layout.value(offset, head, dim)];
        }
        keys[whole.key_scale(at, 0)].copy_from_slice(&block[layout.key_scale(offset, head)]);
        values[PANEL * dims + at * 4..][..4].copy_from_slice(&block[layout.value_scale(offset, head)]);
    }

    fn prepare<'a>(queries: &mut Rows, groups: impl Iterator<Item = Group<'a>>, factor: f32) {
        let Rows { quads, scales, offsets } = queries;
        quads.clear();
        scales.clear();
        offsets.clear();
        for group in groups {
            let start = quads.len();
            quads.resize(start + group[0].len().div_ceil(4), [[[0; 4]; 2]; ROWS]);
            let (mut row_scales, mut row_offsets) = ([0f32; ROWS], [0i32; ROWS]);
            for (r, row) in group.into_iter().enumerate() {
                let [scale, inverse] = scale(row, Q_LARGEST);
                let mut sum = 0;
                for (dim, x) in row.iter().enumerate() {
                    let x = (x * inverse).round_ties_even() as i32;
                    let high = (x + (1 << (Q_SHIFT - 1))) >> Q_SHIFT;
                    let [highs, lows] = &mut quads[start + dim / 4][r];
                    (highs[dim % 4], lows[dim % 4]) = (high as i8, (x - (high << Q_SHIFT)) as i8);
                    sum += x;
                }
                row_scales[r] = scale * factor;
                row_offsets[r] = sum * OFFSET;
            }
            scales.push(row_scales);
            offsets.push(row_offsets);
        }
    }

    #[inline(always)]
    fn scores<V: Wide>(
        queries: &Rows,
        group: usize,
        keys: &Panels<'_, u8>,
        next: Option<&Panels<'_, u8>>,
        scores: &mut [Scores],
    ) {
        let mut next = next;
        for (i, scores) in scores.chunks_mut(V::INT_ROWS).enumerate() {
            let first = i * V::INT_ROWS;
            match scores.len() {
                1 => tile_scores::<V, 1>(queries, group, first, keys, next, scores),
                2 => tile_scores::<V, 2>(queries, group, first, keys, next, scores),
                3 => tile_scores::<V, 3>(queries, group, first, keys, next, scores),
                _ => tile_scores::<V, 4>(queries, group, first, keys, next, scores),
            }
            next = None;
        }
    }

    #[inline(always)]
    fn weigh<V: Wide>(
        weights: &[Scores],
        tokens: usize,
        values: &Panels<'_, u8>,
        next: Option<&Panels<'_, u8>>,
        sums: &mut [[f32; LANES]],
        space: &mut Space,
    ) {
        let stride = sums.len() / weights.len();
        let scales: [V; TILE_PANELS] = value_scales(values);
        let mut next = next;
        for (weights, sums) in weights.chunks(V::INT_ROWS).zip(sums.chunks_mut(V::INT_ROWS * stride)) {
            space.bytes.clear();
            space.scales.clear();
            for weights in weights {
                let (bytes, scale) = split_weights::<V>(weights, tokens, &scales);
                space.bytes.push(bytes);
                space.scales.push(scale);
            }
            match weights.len() {
                1 => tile_sums::<V, 1>(space, tokens, values, next, sums),
                2 => tile_sums::<V, 2>(space, tokens, values, next, sums),
                3 => tile_sums::<V, 3>(space, tokens, values, next, sums),
                _ => tile_sums::<V, 4>(space, tokens, values, next, sums),
            }
            next = None;
        }
    }
}

/// A panel's registers, and behind them its scales.
#[inline(always)]
fn parts(panel: &[u8]) -> (&[[u8; 4 * LANES]], &[[u8; 4]; PANEL]) {
    const NONE: &[[u8; 4]; PANEL] = &[[0; 4]; PANEL];
    let Some((quads, scales)) = panel.split_last_chunk::<SCALES>() else {
        return (&[], NONE);
    };
    (quads.as_chunks().0, scales.as_chunks().0.first_chunk().unwrap_or(NONE))
}

#[inline(always)]
fn scales_of<V: Wide>(bytes: &[[u8; 4]; PANEL]) -> V {
    let mut scales = [0f32; PANEL];
    for (scale, bytes) in scales.iter_mut().zip(bytes) {
        *scale = f32::from_ne_bytes(*bytes);
    }
    V::load(&scales)
}

#[inline(always)]
fn value_scales<V: Wide>(values: &Panels<'_, u8>) -> [V; TILE_PANELS] {
    let mut scales = [V::splat(0.0); TILE_PANELS];
    for panel in 0..TILE_PANELS {
        scales[panel] = scales_of(parts(values[panel]).1);
    }
    scales
}

/// The lines to ask for, as many as a panel has: what is here already where nothing is known.
#[inline(always)]
fn lines<'a>(next: Option<&Panels<'a, u8>>, panel: usize, here: &'a [u8]) -> &'a [[u8; 4 * LANES]] {
    let next = next.map_or(here, |next| if next[panel].is_empty() { here } else { next[panel] });
    next.as_chunks().0
}

#[inline(always)]
fn tile_scores<V: Wide, const R: usize>(
    queries: &Rows,
    group: usize,
    first: usize,
    keys: &Panels<'_, u8>,
    next: Option<&Panels<'_, u8>>,
    scores: &mut [Scores],
) {
    let steps = queries.quads.len() / queries.scales.len();
    let q = &queries.quads[group * steps..][..steps];
    for panel in (0..TILE_PANELS).filter(|&panel| !keys[panel].is_empty()) {
        let (quads, scales) = parts(keys[panel]);
        let (quads, ahead) = (&quads[..steps], &lines(next, panel, keys[panel])[..steps]);
        let [mut high, mut low] = [[V::no_ints(); R]; 2];
        for step in 0..steps {
            prefetch(&ahead[step]);
            let keys = V::load_quads(&quads[step]);
            for r in 0..R {
                let [by_high, by_low] = q[step][(first + r) % ROWS];
                high[r] = V::dot_unsigned(high[r], keys, by_high);
                low[r] = V::dot_unsigned(low[r], keys, by_low);
            }
        }
        let scales = scales_of::<V>(scales);
        for r in 0..R {
            let sum = V::combine::<Q_SHIFT>(high[r], low[r], queries.offsets[group][first + r]);
            let scaled = V::floats(sum).mul(V::splat(queries.scales[group][first + r])).mul(scales);
            scaled.store(&mut scores[r][panel]);
        }
    }
}

/// Weights times the scales of their values, as bytes, and what 1 stands for.
#[inline(always)]
fn split_weights<V: Wide>(weights: &Scores, tokens: usize, scales: &[V; TILE_PANELS]) -> (Weights, f32) {
    let mut scaled = [[0f32; LANES]; TILE_PANELS];
    for panel in 0..TILE_PANELS {
        V::load(&weights[panel]).mul(scales[panel]).store(&mut scaled[panel]);
    }
    // Slots behind the last token hold anything, NaN included.
    if tokens < TILE {
        scaled.as_flattened_mut()[tokens..].fill(0.0);
    }
    let mut most = V::splat(0.0);
    for scaled in &scaled {
        most = V::load(scaled).larger(most);
    }
    let most = largest(most);
    let inverse = V::splat(if most > 0.0 { P_LARGEST / most } else { 0.0 });
    let mut bytes = [[[0u8; 4]; 2]; TILE_PANELS * PANEL / 4];
    for (panel, bytes) in bytes.as_chunks_mut::<{ PANEL / 4 }>().0.iter_mut().enumerate() {
        let mut ints = [0i32; LANES];
        V::load(&scaled[panel]).mul(inverse).rounded(&mut ints);
        let (high, low) = (ints.map(|x| (x >> P_SHIFT) as u8), ints.map(|x| (x & 127) as u8));
        for (bytes, (high, low)) in bytes.iter_mut().zip(high.as_chunks().0.iter().zip(low.as_chunks().0)) {
            *bytes = [*high, *low];
        }
    }
    (bytes, most / P_LARGEST)
}

#[inline(always)]
fn tile_sums<V: Wide, const R: usize>(
    weights: &Space,
    tokens: usize,
    values: &Panels<'_, u8>,
    next: Option<&Panels<'_, u8>>,
    sums: &mut [[f32; LANES]],
) {
    const QUADS: usize = PANEL / 4;
    let Some(p) = weights.bytes.first_chunk::<R>() else { return };
    let stride = sums.len() / R;
    let panels = values.map(|values| &parts(values).0[..if values.is_empty() { 0 } else { QUADS * stride }]);
    let ahead: [_; TILE_PANELS] =
        std::array::from_fn(|panel| &lines(next, panel, values[panel])[..panels[panel].len()]);
    for at in 0..stride {
        let [mut high, mut low] = [[V::no_ints(); R]; 2];
        for panel in 0..TILE_PANELS {
            if panels[panel].is_empty() || panel * PANEL >= tokens {
                continue;
            }
            for quad in 0..QUADS {
                prefetch(&ahead[panel][at * QUADS + quad]);
                let values = V::load_quads(&panels[panel][at * QUADS + quad]);
                for r in 0..R {
                    let [by_high, by_low] = p[r][panel * QUADS + quad];
                    high[r] = V::dot_signed(high[r], values, by_high);
                    low[r] = V::dot_signed(low[r], values, by_low);
                }
            }
        }
        for r in 0..R {
            let sum = V::floats(V::combine::<P_SHIFT>(high[r], low[r], 0));
            let so_far = V::load(&sums[r * stride + at]);
            sum.multiply_add(V::splat(weights.scales[r]), so_far).store(&mut sums[r * stride + at]);
        }
    }
}
