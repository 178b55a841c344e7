//! Keys and values as bytes with a scale for each token and head, multiplied as integers.
//!
//! A key `k` is stored as `s` and `round(k / s) + 128` with `s = max |k| / 127`, a value as `s` and `round(v / s)`. The
//! instructions for products of bytes multiply unsigned bytes by signed ones: keys are unsigned and queries signed,
//! values are signed and weights unsigned. Queries and weights are each split into two bytes, so that their
//! quantisation loses almost no accuracy:
//!
//! ```text
//! q = t (64 high + low)     high from -64 to 64, low from -32 to 31      t = max |q| / 4095
//! p = t (128 high + low)    high and low from 0 to 127                   t = max p / 16383
//! ```
//!
//! A number that is not finite makes the scale of its row NaN, and with it the whole row when it is read. If the
//! numbers of a row are so small that its scale is subnormal or 0, the scale is rounded up, and the numbers are divided
//! by the rounded scale.
//!
//! The ranges are chosen so that AVX2, which adds two products in 16 bits, does not overflow. Sums of integers are
//! exact: they are the same with every instruction set.

mod keys;
mod scores;
mod sums;

use std::array::from_fn;

use block_pool::{BYTE_STRIP, KvLayout, PANEL, QUAD};

use super::{Buffers, Format, ROWS};
use crate::cpu::panels::{Panels, Scores, TILE_PANELS};
use crate::cpu::wide::{LANES, Wide};

/// Keys and values as bytes.
pub(in crate::cpu) struct Int8;

/// The largest `head_dim` for which the sums of products cannot overflow.
pub(crate) const MAX_DIMS: usize = 2048;

/// Added to the integers of a key to make them unsigned.
const OFFSET: i32 = 128;
const Q_SHIFT: i32 = 6;
const Q_LARGEST: f32 = 4095.0;
const P_SHIFT: i32 = 7;
const P_LARGEST: f32 = 16383.0;
/// Bytes of the scales of a panel's keys, or of its values.
const SCALES: usize = PANEL * 4;

/// High bytes and low bytes of four numbers.
type Quad<T> = [[T; 4]; 2];

/// A row's weights of a tile, multiplied by the scales of the values and quantised, one panel after another.
#[derive(Clone, Copy, Default)]
pub(super) struct Weights {
    high: [[u8; PANEL]; TILE_PANELS],
    low: [[u8; PANEL]; TILE_PANELS],
    /// The value of the integer 1.
    scale: f32,
}

/// Query rows as integers, packed in groups of four.
#[derive(Default)]
pub(in crate::cpu) struct Rows {
    /// `(groups, head_dim / 4, 4)`: the four rows that one step of a product reads are adjacent.
    quads: Vec<[Quad<i8>; ROWS]>,
    /// `(groups, 4)`: the value of the integer 1.
    scales: Vec<[f32; ROWS]>,
    /// `(groups, 4)`: the sum of a row's integers, times [`OFFSET`]. It is subtracted from the product with a key.
    offsets: Vec<[i32; ROWS]>,
}

/// Quantises the numbers of a row to integers.
#[derive(Clone, Copy)]
struct Quantiser {
    /// The value of the integer 1. NaN for a row with a number that is not finite.
    scale: f32,
    /// Numbers are multiplied by `first` and then by `then`, since their product can be too large for f32.
    first: f32,
    then: f32,
    /// Integers are from `-limit` to `limit`.
    limit: f32,
}

impl Quantiser {
    /// The quantiser that maps the largest of the row's absolute values to `limit`.
    #[inline(always)]
    fn of(row: &[f32], limit: f32) -> Self {
        // Absolute values are in the order of their bits, and NaN has the largest.
        let bits = row.iter().fold(0, |bits: i32, x| bits.max(x.abs().to_bits() as i32));
        let largest = f32::from_bits(bits as u32);
        let scale = largest / limit;
        if !largest.is_finite() {
            return Self { scale: f32::NAN, first: 0.0, then: 0.0, limit };
        }
        if largest > 0.0 && scale < f32::MIN_POSITIVE {
            // Rounded up, so that the largest number is at most `limit` times the scale. Multiplied by `SCALE_UP`, a
            // subnormal scale is a normal number.
            let scale = if f64::from(scale) * f64::from(limit) < f64::from(largest) { scale.next_up() } else { scale };
            return Self { scale, first: SCALE_UP, then: 1.0 / (scale * SCALE_UP), limit };
        }
        // For numbers close to the largest f32, `scale * limit` must not become infinite.
        let scale = if (scale * limit).is_finite() { scale } else { scale.next_down() };
        Self { scale, first: 1.0, then: if largest == 0.0 { 0.0 } else { limit / largest }, limit }
    }

    /// The integer that is nearest to a number of the row, in units of the scale.
    #[inline(always)]
    fn quantise(&self, x: f32) -> i32 {
        /// `1.5 * 2^23`: adding it rounds to an integer.
        const ROUND: f32 = 12_582_912.0;
        ((x * self.first * self.then).max(-self.limit).min(self.limit) + ROUND).to_bits() as i32
            - ROUND.to_bits() as i32
    }
}

/// A factor that makes the smallest subnormal scale a normal number.
const SCALE_UP: f32 = (1u128 << 100) as f32;

fn read_scale(bytes: &[u8]) -> f32 {
    bytes.first_chunk().map_or(f32::NAN, |bytes| f32::from_ne_bytes(*bytes))
}

impl Format for Int8 {
    type Number = u8;
    type Queries = Rows;

    fn store(layout: &KvLayout, block: &mut [u8], offset: usize, head: usize, k: &[f32], v: &[f32]) {
        let (k_quantiser, v_quantiser) = (Quantiser::of(k, 127.0), Quantiser::of(v, 127.0));
        for (quad, k) in k.chunks(QUAD).enumerate() {
            let to = &mut block[layout.key(offset, head, quad * QUAD)..];
            to.iter_mut().zip(k).for_each(|(to, x)| *to = (k_quantiser.quantise(*x) + OFFSET) as u8);
        }
        for (strip, v) in v.chunks(BYTE_STRIP).enumerate() {
            let to = block[layout.value(offset, head, strip * BYTE_STRIP)..].iter_mut();
            to.step_by(layout.value_step(offset)).zip(v).for_each(|(to, x)| *to = v_quantiser.quantise(*x) as u8);
        }
        block[layout.key_scale(offset, head)].copy_from_slice(&k_quantiser.scale.to_ne_bytes());
        if !layout.values_in_keys {
            block[layout.value_scale(offset, head)].copy_from_slice(&v_quantiser.scale.to_ne_bytes());
        }
    }

    fn load(layout: &KvLayout, block: &[u8], offset: usize, head: usize, k: &mut [f32], v: &mut [f32]) {
        let k_scale = read_scale(&block[layout.key_scale(offset, head)]);
        let v_scale = read_scale(&block[layout.value_scale(offset, head)]);
        for (quad, k) in k.chunks_mut(QUAD).enumerate() {
            let from = &block[layout.key(offset, head, quad * QUAD)..];
            k.iter_mut().zip(from).for_each(|(k, x)| *k = (i32::from(*x) - OFFSET) as f32 * k_scale);
        }
        if layout.values_in_keys {
            v.copy_from_slice(&k[..layout.value_dim]);
            return;
        }
        for (strip, v) in v.chunks_mut(BYTE_STRIP).enumerate() {
            let from = block[layout.value(offset, head, strip * BYTE_STRIP)..].iter();
            let from = from.step_by(layout.value_step(offset));
            v.iter_mut().zip(from).for_each(|(v, x)| *v = f32::from(*x as i8) * v_scale);
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
        index: usize,
        dims: usize,
    ) {
        let (keys, values) = to;
        let panel_layout = KvLayout { block_size: PANEL, kv_heads: 1, value_dim: dims, ..*layout };
        for first in (0..layout.head_dim).step_by(QUAD) {
            let from = &block[layout.key(offset, head, first)..][..QUAD];
            keys[panel_layout.key(index, 0, first)..][..QUAD].copy_from_slice(from);
        }
        keys[panel_layout.key_scale(index, 0)].copy_from_slice(&block[layout.key_scale(offset, head)]);
        if layout.values_in_keys {
            return;
        }
        let first = panel_layout.value_panel(0, 0).start;
        for strip in (0..layout.value_dim).step_by(BYTE_STRIP) {
            let dims = BYTE_STRIP.min(layout.value_dim - strip);
            let from = block[layout.value(offset, head, strip)..].iter().step_by(layout.value_step(offset));
            let to = values[panel_layout.value(index, 0, strip) - first..].iter_mut();
            let to = to.step_by(panel_layout.value_step(index));
            to.zip(from).take(dims).for_each(|(to, from)| *to = *from);
        }
        values[PANEL * dims + index * 4..][..4].copy_from_slice(&block[layout.value_scale(offset, head)]);
    }

    fn clear(queries: &mut Rows) {
        queries.quads.clear();
        queries.scales.clear();
        queries.offsets.clear();
    }

    #[inline(always)]
    fn prepare(queries: &mut Rows, rows: &[f32], head_dim: usize, factor: f32) {
        let Rows { quads, scales, offsets } = queries;
        let start = quads.len();
        quads.resize(start + head_dim.div_ceil(4), [[[0; 4]; 2]; ROWS]);
        let (mut row_scales, mut row_offsets) = ([0f32; ROWS], [0i32; ROWS]);
        for (r, row) in rows.chunks_exact(head_dim).enumerate() {
            let quantiser = Quantiser::of(row, Q_LARGEST);
            let mut sum = 0;
            let (vectors, rest) = row.as_chunks();
            // Dimensions beyond the last are 0.
            let mut last = [0f32; LANES];
            last[..rest.len()].copy_from_slice(rest);
            let vectors = vectors.iter().chain((!rest.is_empty()).then_some(&last));
            for (quads, numbers) in quads[start..].chunks_mut(LANES / 4).zip(vectors) {
                let integers = numbers.map(|x| quantiser.quantise(x));
                let high = integers.map(|x| (x + (1 << (Q_SHIFT - 1))) >> Q_SHIFT);
                let low: [i8; LANES] = from_fn(|i| (integers[i] - (high[i] << Q_SHIFT)) as i8);
                let high = high.map(|high| high as i8);
                let split = high.as_chunks().0.iter().zip(low.as_chunks().0);
                for (quad, (high, low)) in quads.iter_mut().zip(split) {
                    quad[r] = [*high, *low];
                }
                sum += integers.iter().sum::<i32>();
            }
            row_scales[r] = quantiser.scale * factor;
            row_offsets[r] = sum * OFFSET;
        }
        scales.push(row_scales);
        offsets.push(row_offsets);
    }

    #[inline(always)]
    fn scores<V: Wide>(
        queries: &Rows,
        first: usize,
        keys: &Panels<'_, u8>,
        next: Option<&Panels<'_, u8>>,
        scores: &mut [Scores],
    ) {
        let mut next = next;
        for (i, scores) in scores.chunks_mut(V::INT_ROWS).enumerate() {
            let (group, row) = (first + i * V::INT_ROWS / ROWS, i * V::INT_ROWS % ROWS);
            by_rows!(scores.len(), N => scores::tile::<V, N>(queries, group, row, keys, next, scores));
            next = None;
        }
    }

    #[inline(always)]
    fn accumulate<V: Wide>(
        weights: &[Scores],
        tokens: usize,
        values: &Panels<'_, u8>,
        next: Option<&Panels<'_, u8>>,
        sums: &mut [[f32; LANES]],
        buffers: &mut Buffers,
    ) {
        let stride = sums.len() / weights.len();
        V::outlined(sums::QuantiseWeights { weights, tokens, values, to: &mut buffers.weights });
        let mut next = next;
        for (i, sums) in sums.chunks_mut(V::INT_ROWS * stride).enumerate() {
            let rows = &buffers.weights[i * V::INT_ROWS..];
            by_rows!(sums.len() / stride, N => sums::tile::<V, N>(rows, tokens, values, next, sums));
            next = None;
        }
    }
    #[inline(always)]
    fn accumulate_keys<V: Wide>(
        weights: &[Scores],
        tokens: usize,
        keys: &Panels<'_, u8>,
        value_dim: usize,
        sums: &mut [[f32; LANES]],
        buffers: &mut Buffers,
    ) {
        let stride = sums.len() / weights.len();
        let mut bytes = std::mem::take(&mut buffers.bytes);
        let values = keys::transposed::<V>(keys, value_dim, stride * LANES, &mut bytes);
        for (weights, sums) in weights.chunks(ROWS).zip(sums.chunks_mut(ROWS * stride)) {
            Self::accumulate::<V>(weights, tokens, &values, None, sums, buffers);
        }
        buffers.bytes = bytes;
    }
}

/// Splits the keys, or the values, of a panel into vectors of 64 bytes and the scales that follow them.
#[inline(always)]
fn split_scales(panel: &[u8]) -> (&[[u8; 4 * LANES]], &[[u8; 4]; PANEL]) {
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

/// The cache lines to prefetch for a panel: those of `next`, or if there are none those of `current`, which are in the
/// cache already, so that the prefetch costs least.
#[inline(always)]
fn lines_to_prefetch<'a>(next: Option<&Panels<'a, u8>>, panel: usize, current: &'a [u8]) -> &'a [[u8; 4 * LANES]] {
    let next = next.map_or(current, |next| if next[panel].is_empty() { current } else { next[panel] });
    next.as_chunks().0
}
