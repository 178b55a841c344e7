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
//! A number that is not finite makes the scale of its row NaN, and with it the whole row when it is read. Where a row is so
//! small that its scale has few bits, or none, the scale is rounded up, and the numbers are divided by it as it is stored.
//!
//! The ranges are such that AVX2, which adds two products in 16 bits, has room for them. Sums of integers are exact: the
//! instruction sets differ in nothing.

mod scores;
mod sums;

use block_pool::{KvLayout, PANEL};

use super::{Format, ROWS, Space};
use crate::cpu::tile::{Panels, Scores, TILE_PANELS};
use crate::cpu::wide::{LANES, Wide};

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

/// A row's weights of a tile times their values' scales, as bytes: four tokens by four, panel after panel.
#[derive(Clone, Copy, Default)]
pub(super) struct Weights {
    high: [[u8; PANEL]; TILE_PANELS],
    low: [[u8; PANEL]; TILE_PANELS],
    /// What 1 stands for.
    scale: f32,
}

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

/// How the numbers of a row become integers.
#[derive(Clone, Copy)]
struct Scale {
    /// What 1 stands for. NaN for a row with a number that is not finite.
    one: f32,
    /// What numbers are multiplied with, `first` and then `then`: one factor can be beyond f32.
    first: f32,
    then: f32,
    /// The largest integer, on either side.
    most: f32,
}

impl Scale {
    /// So that the largest of a row's numbers becomes `most`.
    fn of(row: &[f32], most: f32) -> Self {
        let largest = row.iter().fold(0f32, |m, x| if x.abs() > m || x.is_nan() { x.abs() } else { m });
        let one = largest / most;
        if !largest.is_finite() {
            return Self { one: f32::NAN, first: 0.0, then: 0.0, most };
        }
        if largest > 0.0 && one < f32::MIN_POSITIVE {
            // Rounded up, so that the largest number is within reach. Multiplied by `GROW` a scale has all its bits.
            let one = if f64::from(one) * f64::from(most) < f64::from(largest) { one.next_up() } else { one };
            return Self { one, first: GROW, then: 1.0 / (one * GROW), most };
        }
        // The largest number there is, divided and multiplied again, must not become infinite.
        let one = if (one * most).is_finite() { one } else { one.next_down() };
        Self { one, first: 1.0, then: if largest == 0.0 { 0.0 } else { most / largest }, most }
    }

    /// The integer nearest to a number of the row.
    #[inline]
    fn whole(&self, x: f32) -> i32 {
        /// The sum has no bits behind the point left.
        const ROUND: f32 = 12_582_912.0;
        ((x * self.first * self.then).max(-self.most).min(self.most) + ROUND).to_bits() as i32 - ROUND.to_bits() as i32
    }
}

/// What makes the smallest scale a number with all its bits.
const GROW: f32 = (1u128 << 100) as f32;

fn read_scale(bytes: &[u8]) -> f32 {
    bytes.first_chunk().map_or(f32::NAN, |bytes| f32::from_ne_bytes(*bytes))
}

impl Format for Int8 {
    type Number = u8;
    type Queries = Rows;

    fn store(layout: &KvLayout, block: &mut [u8], offset: usize, head: usize, k: &[f32], v: &[f32]) {
        let (of_k, of_v) = (Scale::of(k, 127.0), Scale::of(v, 127.0));
        for (dim, x) in k.iter().enumerate() {
            block[layout.key(offset, head, dim)] = (of_k.whole(*x) + OFFSET) as u8;
        }
        for (dim, x) in v.iter().enumerate() {
            block[layout.value(offset, head, dim)] = of_v.whole(*x) as u8;
        }
        block[layout.key_scale(offset, head)].copy_from_slice(&of_k.one.to_ne_bytes());
        block[layout.value_scale(offset, head)].copy_from_slice(&of_v.one.to_ne_bytes());
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

    fn clear(queries: &mut Rows) {
        queries.quads.clear();
        queries.scales.clear();
        queries.offsets.clear();
    }

    fn prepare(queries: &mut Rows, rows: &[f32], head_dim: usize, factor: f32) {
        let Rows { quads, scales, offsets } = queries;
        let start = quads.len();
        quads.resize(start + head_dim.div_ceil(4), [[[0; 4]; 2]; ROWS]);
        let (mut row_scales, mut row_offsets) = ([0f32; ROWS], [0i32; ROWS]);
        for (r, row) in rows.chunks_exact(head_dim).enumerate() {
            let scale = Scale::of(row, Q_LARGEST);
            let mut sum = 0;
            for (dim, x) in row.iter().enumerate() {
                let x = scale.whole(*x);
                let high = (x + (1 << (Q_SHIFT - 1))) >> Q_SHIFT;
                let [highs, lows] = &mut quads[start + dim / 4][r];
                (highs[dim % 4], lows[dim % 4]) = (high as i8, (x - (high << Q_SHIFT)) as i8);
                sum += x;
            }
            row_scales[r] = scale.one * factor;
            row_offsets[r] = sum * OFFSET;
        }
        scales.push(row_scales);
        offsets.push(row_offsets);
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
                1 => scores::tile::<V, 1>(queries, group, first, keys, next, scores),
                2 => scores::tile::<V, 2>(queries, group, first, keys, next, scores),
                3 => scores::tile::<V, 3>(queries, group, first, keys, next, scores),
                _ => scores::tile::<V, 4>(queries, group, first, keys, next, scores),
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
        V::apart(sums::Split { weights, tokens, values, space });
        let mut next = next;
        for (i, sums) in sums.chunks_mut(V::INT_ROWS * stride).enumerate() {
            let rows = &space.weights[i * V::INT_ROWS..];
            match sums.len() / stride {
                1 => sums::tile::<V, 1>(rows, tokens, values, next, sums),
                2 => sums::tile::<V, 2>(rows, tokens, values, next, sums),
                3 => sums::tile::<V, 3>(rows, tokens, values, next, sums),
                _ => sums::tile::<V, 4>(rows, tokens, values, next, sums),
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

/// The lines of a panel to ask for: where nothing is known of what comes next, what is here already, which costs least.
#[inline(always)]
fn ahead<'a>(next: Option<&Panels<'a, u8>>, panel: usize, here: &'a [u8]) -> &'a [[u8; 4 * LANES]] {
    let next = next.map_or(here, |next| if next[panel].is_empty() { here } else { next[panel] });
    next.as_chunks().0
}
