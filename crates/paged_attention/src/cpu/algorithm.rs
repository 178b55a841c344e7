//! Attention over blocks: online softmax over tiles of tokens.
//!
//! A *task* is one key head and a few consecutive new tokens of one sequence. Its *rows* are those tokens times the
//! query heads of the group, so that decode (one token, a group of heads) and prefill (many tokens) are the same
//! computation, and every key and value is loaded once for all rows.
//!
//! For each tile of tokens, with `m` the largest score so far, `l` the sum of weights and `o` the weighted sum of
//! values (Milakov and Gimelshein 2018; Dao et al. 2022, section 3.1):
//!
//! ```text
//! s = q K        m' = max(m, max s)      p = exp(s - m')
//! l = l exp(m - m') + sum p              o = o exp(m - m') + p V
//! ```
//!
//! The order of all sums depends on token positions alone. A row's result is the same to the last bit whatever blocks
//! hold the tokens, whichever rows are computed beside it, and however many threads there are.

use block_pool::KvLayout;

use super::element::Element;
use super::exp::exp_nonpositive;
use super::prefetch::prefetch;
use crate::plan::{Sight, Span};

/// Tokens per tile, at least: scores of one tile are computed before they are weighed.
const TILE: usize = 64;
/// Tokens or dimensions that one register block covers.
const LANES: usize = 16;
/// Rows that one register block covers.
const ROWS: usize = 4;

/// What one task reads.
pub(super) struct Task<'a, T> {
    /// All blocks of the layer.
    pub(super) storage: &'a [T],
    pub(super) layout: &'a KvLayout,
    /// The sequence's blocks, in order.
    pub(super) blocks: &'a [u32],
    /// The key head.
    pub(super) head: usize,
    /// `(tokens, group, head_dim)`: each token's query heads of this key head, one run per token.
    pub(super) queries: &'a [&'a [f32]],
    /// The sequence, and which of its new tokens the first of the queries is.
    pub(super) span: &'a Span,
    pub(super) first: usize,
    pub(super) causal: bool,
    pub(super) scale: f32,
}

/// Memory that a thread uses again from task to task.
#[derive(Default)]
pub(super) struct Scratch {
    /// `(rows, head_dim)`: scaled queries.
    q: Vec<f32>,
    /// `(rows, head_dim)`: weighted sums of values.
    o: Vec<f32>,
    /// `(rows, tile)`: scores, then weights.
    p: Vec<f32>,
    /// `(rows)`: largest score, sum of weights.
    m: Vec<f32>,
    l: Vec<f32>,
    /// One head of one block's keys or values, converted.
    wide: Vec<f32>,
}

/// Computes one task. `out` has the shape of `task.queries`. `FMA` says that a fused multiply-add is one instruction.
#[inline(always)]
pub(super) fn attend<T: Element, const FMA: bool>(task: &Task<'_, T>, out: &mut [&mut [f32]], scratch: &mut Scratch) {
    let KvLayout { block_size, head_dim, .. } = *task.layout;
    let Some(width) = task.queries.first().map(|q| q.len()) else {
        return;
    };
    let group = width / head_dim;
    let rows = task.queries.len() * group;
    let tile = TILE.div_ceil(block_size) * block_size;
    let block_elements = task.layout.block_elements();
    let seen_by = |row: usize| task.span.sight(task.first + row / group, task.causal);
    let total = seen_by(rows - 1).recent.end;

    let Scratch { q, o, p, m, l, wide } = scratch;
    q.clear();
    q.extend(task.queries.iter().flat_map(|run| run.iter().map(|x| x * task.scale)));
    refill(o, rows * head_dim, 0.0);
    refill(p, rows * tile, 0.0);
    refill(m, rows, f32::NEG_INFINITY);
    refill(l, rows, 0.0);
    wide.resize(task.layout.head_elements(), 0.0);

    for start in (0..total).step_by(tile) {
        let end = total.min(start + tile);
        // The first rows may see nothing of this tile: rows see further and further. Those behind them look back less and
        // less far.
        let first_row = (0..rows).step_by(group).find(|&row| seen_by(row).recent.end > start).unwrap_or(rows);
        let Sight { sinks, recent } = seen_by(first_row);
        if sinks <= start && recent.start >= end {
            continue;
        }
        let block = |id: u32| &task.storage[id as usize * block_elements..][..block_elements];
        // Blocks that a window has given back are skipped; nobody sees them.
        let blocks = (start / block_size..end.div_ceil(block_size))
            .enumerate()
            .filter_map(|(b, block)| Some((b, task.blocks[task.span.place(block)?])));

        // What is read next is asked for while this is computed, a line at each step: in bursts the requests are dropped.
        let keys_of = |id: u32| &block(id)[task.layout.head_keys(task.head)];
        let values_of = |id: u32| &block(id)[task.layout.head_values(task.head)];
        let mut next = blocks.clone().skip(1);
        let first_values = blocks.clone().next().map(|(_, id)| values_of(id));
        for (b, id) in blocks.clone() {
            let ahead = Ahead(next.next().map(|(_, id)| keys_of(id)).or(first_values).unwrap_or(&[]));
            let keys = T::widened(keys_of(id), wide);
            let at = b * block_size;
            for row in (first_row..rows).step_by(ROWS) {
                let ahead = if row == first_row { ahead } else { Ahead(&[]) };
                let (q, p) = (&q[row * head_dim..], &mut p[row * tile + at..]);
                match rows - row {
                    1 => scores::<T, 1, FMA>(q, keys, p, head_dim, block_size, tile, ahead),
                    2 => scores::<T, 2, FMA>(q, keys, p, head_dim, block_size, tile, ahead),
                    3 => scores::<T, 3, FMA>(q, keys, p, head_dim, block_size, tile, ahead),
                    _ => scores::<T, ROWS, FMA>(q, keys, p, head_dim, block_size, tile, ahead),
                }
            }
        }

        for row in first_row..rows {
            let Sight { sinks, recent } = seen_by(row);
            let within = |position: usize| position.clamp(start, end) - start;
            let p = &mut p[row * tile..][..end - start];
            // The sinks and the recent tokens of this tile, and between and behind them what this row does not see.
            let (sinks, recent) = (0..within(sinks), within(recent.start)..within(recent.end));
            let highest = max(&p[recent.clone()], max(&p[sinks.clone()], m[row]));
            // All scores -inf: nothing to weigh yet, and -inf - -inf is not a number.
            let reference = if highest == f32::NEG_INFINITY { 0.0 } else { highest };
            let shrink = exp_nonpositive(m[row] - reference);
            p[sinks.end..recent.start].fill(0.0);
            p[recent.end..].fill(0.0);
            let mut weight = 0.0;
            for seen in [sinks, recent] {
                let p = &mut p[seen];
                for s in p.iter_mut() {
                    *s = exp_nonpositive(*s - reference);
                }
                weight += sum(p);
            }
            l[row] = l[row] * shrink + weight;
            m[row] = highest;
            if shrink != 1.0 {
                o[row * head_dim..][..head_dim].iter_mut().for_each(|x| *x *= shrink);
            }
        }

        let mut next = blocks.clone().skip(1);
        let next_keys = task.span.place(end / block_size).and_then(|at| task.blocks.get(at)).map(|&id| keys_of(id));
        for (b, id) in blocks {
            let ahead = Ahead(next.next().map(|(_, id)| values_of(id)).or(next_keys).unwrap_or(&[]));
            let values = T::widened(values_of(id), wide);
            let at = b * block_size;
            // Slots behind the last token hold anything, NaN included: they are not read.
            let tokens = block_size.min(end - start - at);
            for row in (first_row..rows).step_by(ROWS) {
                let ahead = if row == first_row { ahead } else { Ahead(&[]) };
                let (p, o) = (&p[row * tile + at..], &mut o[row * head_dim..]);
                match rows - row {
                    1 => weigh::<T, 1, FMA>(p, values, o, head_dim, tokens, tile, ahead),
                    2 => weigh::<T, 2, FMA>(p, values, o, head_dim, tokens, tile, ahead),
                    3 => weigh::<T, 3, FMA>(p, values, o, head_dim, tokens, tile, ahead),
                    _ => weigh::<T, ROWS, FMA>(p, values, o, head_dim, tokens, tile, ahead),
                }
            }
        }
    }

    for (token, out) in out.iter_mut().enumerate() {
        for (h, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let row = token * group + h;
            let by = 1.0 / l[row];
            for (out, x) in out.iter_mut().zip(&o[row * head_dim..]) {
                *out = x * by;
            }
        }
    }
}

/// What is read next: as many numbers as are read now, or none.
struct Ahead<'a, T>(&'a [T]);

impl<T> Clone for Ahead<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Ahead<'_, T> {}

impl<T> Ahead<'_, T> {
    /// Asks for the cache line of the number at `at`.
    #[inline(always)]
    fn ask(self, at: usize) {
        if let Some(x) = self.0.get(at) {
            prefetch(x);
        }
    }
}

/// `p (R, tokens) = q (R, head_dim) * keys (head_dim, tokens)`; rows of p are `stride` apart.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn scores<T, const R: usize, const FMA: bool>(
    q: &[f32],
    keys: &[f32],
    p: &mut [f32],
    head_dim: usize,
    tokens: usize,
    stride: usize,
    ahead: Ahead<'_, T>,
) {
    let q: [&[f32]; R] = std::array::from_fn(|r| &q[r * head_dim..][..head_dim]);
    let lanes_end = tokens / LANES * LANES;
    for at in (0..lanes_end).step_by(LANES) {
        let mut sums = [[0f32; LANES]; R];
        for (d, keys) in keys.chunks_exact(tokens).enumerate() {
            let keys = &keys[at..][..LANES];
            ahead.ask(d * tokens + at);
            for r in 0..R {
                let x = q[r][d];
                for t in 0..LANES {
                    sums[r][t] = multiply_add::<FMA>(x, keys[t], sums[r][t]);
                }
            }
        }
        for r in 0..R {
            p[r * stride + at..][..LANES].copy_from_slice(&sums[r]);
        }
    }
    if lanes_end == tokens {
        return;
    }
    for r in 0..R {
        let rest = &mut p[r * stride + lanes_end..][..tokens - lanes_end];
        rest.fill(0.0);
        for (d, keys) in keys.chunks_exact(tokens).enumerate() {
            let x = q[r][d];
            for (sum, &key) in rest.iter_mut().zip(&keys[lanes_end..]) {
                *sum = multiply_add::<FMA>(x, key, *sum);
            }
        }
    }
}

/// `o (R, head_dim) += p (R, tokens) * values (tokens, head_dim)`; rows of p are `stride` apart.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn weigh<T, const R: usize, const FMA: bool>(
    p: &[f32],
    values: &[f32],
    o: &mut [f32],
    head_dim: usize,
    tokens: usize,
    stride: usize,
    ahead: Ahead<'_, T>,
) {
    let p: [&[f32]; R] = std::array::from_fn(|r| &p[r * stride..][..tokens]);
    let lanes_end = head_dim / LANES * LANES;
    for at in (0..lanes_end).step_by(LANES) {
        let mut sums = [[0f32; LANES]; R];
        for r in 0..R {
            sums[r].copy_from_slice(&o[r * head_dim + at..][..LANES]);
        }
        for t in 0..tokens {
            let values = &values[t * head_dim + at..][..LANES];
            ahead.ask(t * head_dim + at);
            for r in 0..R {
                let weight = p[r][t];
                for d in 0..LANES {
                    sums[r][d] = multiply_add::<FMA>(weight, values[d], sums[r][d]);
                }
            }
        }
        for r in 0..R {
            o[r * head_dim + at..][..LANES].copy_from_slice(&sums[r]);
        }
    }
    if lanes_end == head_dim {
        return;
    }
    for r in 0..R {
        let rest = &mut o[r * head_dim + lanes_end..][..head_dim - lanes_end];
        for t in 0..tokens {
            let weight = p[r][t];
            for (sum, &value) in rest.iter_mut().zip(&values[t * head_dim + lanes_end..]) {
                *sum = multiply_add::<FMA>(weight, value, *sum);
            }
        }
    }
}

/// A sum in `LANES` partial sums, for the rounding as much as for the speed.
#[inline(always)]
fn sum(xs: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let chunks = xs.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// The largest of `xs` and `least`, in `LANES` partial maxima.
#[inline(always)]
fn max(xs: &[f32], least: f32) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut largest = [least; LANES];
    let chunks = xs.chunks_exact(LANES);
    let rest = chunks.remainder().iter().fold(least, |m, &x| larger(m, x));
    for chunk in chunks {
        for (m, &x) in largest.iter_mut().zip(chunk) {
            *m = larger(*m, x);
        }
    }
    largest.into_iter().fold(rest, larger)
}

/// `a * b + c`. Without the instruction, `mul_add` is a call that computes the single rounding in software.
#[inline(always)]
fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

fn refill(xs: &mut Vec<f32>, len: usize, with: f32) {
    xs.clear();
    xs.resize(len, with);
}
