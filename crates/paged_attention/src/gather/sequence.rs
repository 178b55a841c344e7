//! One sequence, with its keys and values in one tensor each.

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor};

use crate::Attention;
use crate::dense::Row;
use crate::plan::{Planned, VisibleRange};

/// Whether all numbers are finite.
pub(super) fn is_finite(numbers: &Tensor) -> Result<bool> {
    Ok((numbers * 0.0)?.sum_all()?.to_scalar::<f32>()? == 0.0)
}

/// How many scores are computed, and so kept in memory, at a time: 16 MB for each tensor of their shape.
const MAX_SCORES: usize = 1 << 22;

/// The new tokens of one sequence, and the keys and values of the tokens that they may see. All numbers are f32.
pub(crate) struct Sequence<'a> {
    planned: Planned,
    attention: &'a Attention,
    /// The positions of the keys and values, in ascending order.
    positions: Vec<usize>,
    /// `(rows, heads, head_dim)`.
    q: Tensor,
    /// `(kv_heads, len, head_dim)`.
    k: Tensor,
    /// `(kv_heads, len, value_dim)`.
    v: Tensor,
}

impl<'a> Sequence<'a> {
    /// Takes q `(rows, heads, head_dim)` of the new tokens of `planned`, and k `(len, kv_heads, head_dim)` and v `(len,
    /// kv_heads, value_dim)` of the tokens at `positions`.
    pub(crate) fn new(
        planned: Planned,
        attention: &'a Attention,
        positions: Vec<usize>,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Self> {
        let to_heads = |t: &Tensor| t.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous();
        let (q, k, v) = (q.to_dtype(DType::F32)?, to_heads(k)?, to_heads(v)?);
        Ok(Self { planned, attention, positions, q, k, v })
    }

    /// Attention of all rows, `(rows, heads, value_dim)`, and the logarithms of their sums of weights, `(rows, heads)`.
    pub(crate) fn attend(&self) -> Result<(Tensor, Tensor)> {
        let computed = self.in_f32()?;
        if is_finite(&computed.0)? { Ok(computed) } else { self.recompute() }
    }

    /// The same, whether the result is finite or not.
    pub(super) fn in_f32(&self) -> Result<(Tensor, Tensor)> {
        self.products(&self.v)
    }

    /// Attention of all rows over the values `v`. A value that is not finite also changes rows that do not see it.
    fn products(&self, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (rows, heads, _) = self.q.dims3()?;
        let (len, device) = (self.positions.len(), self.q.device());
        if len == 0 {
            let out = Tensor::zeros((rows, heads, self.v.dim(2)?), DType::F32, device)?;
            let sink = (0..rows * heads).map(|i| self.attention.sink_logit(i % heads).unwrap_or(f32::NEG_INFINITY));
            return Ok((out, Tensor::from_vec(sink.collect::<Vec<_>>(), (rows, heads), device)?));
        }
        let keys = self.positions.iter().map(|&position| position as u32).collect();
        let keys = Tensor::from_vec(keys, (1, len), device)?;
        let step = (MAX_SCORES / (heads * len)).max(1);
        let pieces = (0..rows).step_by(step).map(|first| self.piece(first..rows.min(first + step), &keys, v));
        let (outs, lses): (Vec<_>, Vec<_>) = pieces.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        // Adding zero turns -0.0 into 0.0: the sign of a zero sum can come from a value whose weight is zero.
        Ok(((Tensor::cat(&outs, 0)? + 0.0)?, Tensor::cat(&lses, 0)?))
    }

    /// Attention of some of the rows. `keys (1, len)` has the positions of the keys.
    fn piece(&self, rows: Range<usize>, keys: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let Self { attention, .. } = *self;
        let (_, heads, head_dim) = self.q.dims3()?;
        let (kv_heads, len, value_dim) = self.v.dims3()?;
        let (first, n, group) = (rows.start, rows.len(), heads / kv_heads);
        // The query heads of one key head become the rows of one product, so that keys are not repeated.
        let q = (self.q.narrow(0, first, n)? * f64::from(attention.scale))?
            .reshape((n, kv_heads, group, head_dim))?
            .permute((1, 2, 0, 3))?
            .reshape((kv_heads, group * n, head_dim))?;
        let mut scores = q.matmul(&self.k.t()?)?.reshape((heads, n, len))?;
        if let Some(cap) = attention.soft_cap {
            scores = capped(&scores, cap)?;
        }
        if let Some(slopes) = &attention.slopes {
            scores = (scores + self.bias(rows.clone(), keys, slopes)?)?;
        }
        if let Some(seen) = self.seen(rows, keys)? {
            // Scores are replaced by -inf. Adding -inf would leave a NaN in place.
            let least = Tensor::new(f32::NEG_INFINITY, scores.device())?.broadcast_as(scores.shape())?;
            scores = seen.broadcast_as(scores.shape())?.where_cond(&scores, &least)?;
        }
        let mut max = scores.max_keepdim(D::Minus1)?;
        let sink = attention.sink_logits.as_ref().map(|logits| Tensor::new(&**logits, scores.device()));
        let sink = sink.transpose()?.map(|sink| sink.reshape((heads, 1, 1))?.broadcast_as(max.shape())).transpose()?;
        if let Some(sink) = &sink {
            max = max.maximum(sink)?;
        }
        let weights = scores.broadcast_sub(&max)?.exp()?;
        let mut sum = weights.sum_keepdim(D::Minus1)?;
        if let Some(sink) = &sink {
            sum = (sum + (sink - &max)?.exp()?)?;
        }
        let out = weights
            .broadcast_div(&sum)?
            .reshape((kv_heads, group * n, len))?
            .matmul(v)?
            .reshape((kv_heads, group, n, value_dim))?
            .permute((2, 0, 1, 3))?
            .reshape((n, heads, value_dim))?;
        let lse = (max + sum.log()?)?.reshape((heads, n))?.t()?.contiguous()?;
        Ok((out, lse))
    }

    /// The ALiBi bias by distance, `(heads, rows, len)`.
    fn bias(&self, rows: Range<usize>, keys: &Tensor, slopes: &[f32]) -> Result<Tensor> {
        let device = keys.device();
        let positions: Vec<f32> = rows.map(|row| (self.planned.start + row) as f32).collect();
        let rows = Tensor::new(positions, device)?.unsqueeze(1)?;
        let distances = keys.to_dtype(DType::F32)?.broadcast_sub(&rows)?;
        Tensor::from_slice(slopes, (slopes.len(), 1, 1), device)?.broadcast_mul(&distances.unsqueeze(0)?)
    }

    /// The mask of the keys that some of the rows see, `(rows, len)` of 0 and 1. `None` if every row sees all keys.
    fn seen(&self, rows: Range<usize>, keys: &Tensor) -> Result<Option<Tensor>> {
        let Self { planned, attention, .. } = self;
        let windowed = !planned.span.is_all() || attention.window.is_some();
        let last_alone = planned.rows.len() == 1 && planned.start + 1 >= planned.len();
        if !windowed && (!attention.causal || last_alone) {
            return Ok(None);
        }
        let ranges: Vec<VisibleRange> = rows.map(|row| planned.visible(row, attention)).collect();
        let column = |of: fn(&VisibleRange) -> usize| {
            let ends = ranges.iter().map(|visible| of(visible) as u32).collect();
            Tensor::from_vec(ends, (ranges.len(), 1), keys.device())
        };
        let from = keys.broadcast_ge(&column(|visible| visible.recent.start)?)?;
        let before = keys.broadcast_lt(&column(|visible| visible.recent.end)?)?;
        let sink_tokens = keys.broadcast_lt(&column(|visible| visible.sink_tokens)?)?;
        // The two ranges are disjoint: recent positions begin after the sink tokens.
        Ok(Some((sink_tokens + (from * before)?)?))
    }

    /// Attention of all rows when some numbers are not finite, or sums leave the range of f32.
    ///
    /// First all rows are computed in f32 with the non-finite values set to zero. A row that sees none of them gets, to
    /// the last bit, the result that it has without them. Rows that see non-finite values, and rows whose result is
    /// still not finite, are then computed in f64.
    pub(super) fn recompute(&self) -> Result<(Tensor, Tensor)> {
        let finite = self.v.abs()?.le(f32::MAX)?;
        let (out, lse) = self.products(&finite.where_cond(&self.v, &self.v.zeros_like()?)?)?;
        let (shape, mut out, mut logs) = (out.shape().clone(), numbers(&out)?, numbers(&lse)?);
        let (_, len, value_dim) = self.v.dims3()?;
        // For each key head and each index of a token, how many tokens before it have a value that is not finite.
        let v = numbers(&self.v)?;
        let counts: Vec<Vec<usize>> =
            v.chunks_exact((len * value_dim).max(1)).map(|v| count_non_finite(v, value_dim)).collect();
        let index_of = |position: usize| self.positions.partition_point(|&before| before < position);
        let sees_non_finite = |visible: &VisibleRange, key_head: usize| {
            let counts: &[usize] = &counts[key_head];
            [0..visible.sink_tokens, visible.recent.clone()]
                .iter()
                .any(|range| counts[index_of(range.start)] < counts[index_of(range.end)])
        };
        self.in_f64(&mut out, &mut logs, sees_non_finite)?;
        let device = self.q.device();
        Ok((Tensor::from_vec(out, shape, device)?, Tensor::from_vec(logs, lse.shape(), device)?))
    }

    /// Computes rows of `out (rows, heads, value_dim)` in f64, and the logarithms of their sums of weights, `lse (rows,
    /// heads)`: rows that are not finite, and rows for which `also` returns true. `also` gets the positions that the
    /// row sees and its key head.
    pub(crate) fn in_f64(
        &self,
        out: &mut [f32],
        lse: &mut [f32],
        also: impl Fn(&VisibleRange, usize) -> bool,
    ) -> Result<()> {
        let (_, heads, head_dim) = self.q.dims3()?;
        let (kv_heads, len, value_dim) = self.v.dims3()?;
        let (q, k, v) = (numbers(&self.q)?, numbers(&self.k)?, numbers(&self.v)?);
        let rows = q.chunks_exact(head_dim).zip(out.chunks_exact_mut(value_dim)).zip(lse);
        for (i, ((q, out), lse)) in rows.enumerate() {
            let (row, head) = (i / heads, i % heads);
            let key_head = head / (heads / kv_heads);
            let seen = self.planned.visible(row, self.attention);
            if out.iter().all(|x| x.is_finite()) && !also(&seen, key_head) {
                continue;
            }
            let load = |position: usize, to_k: &mut [f32], to_v: &mut [f32]| {
                let Ok(at) = self.positions.binary_search(&position) else { return false };
                to_k.copy_from_slice(&k[(key_head * len + at) * head_dim..][..head_dim]);
                to_v.copy_from_slice(&v[(key_head * len + at) * value_dim..][..value_dim]);
                true
            };
            let row = Row { q, head, position: self.planned.start + row, seen, attention: self.attention };
            *lse = row.attend(load, out) * std::f32::consts::LN_2;
        }
        Ok(())
    }
}

/// All numbers of an f32 tensor.
fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

/// For each token, how many tokens before it have a number that is not finite; at the end, how many of all tokens have
/// one.
fn count_non_finite(v: &[f32], head_dim: usize) -> Vec<usize> {
    let mut before = 0;
    let mut counts = vec![0];
    for v in v.chunks_exact(head_dim) {
        before += usize::from(v.iter().any(|x| !x.is_finite()));
        counts.push(before);
    }
    counts
}

/// `cap * tanh(scores / cap)`, exact for every finite cap and for scores of every size.
fn capped(scores: &Tensor, cap: f32) -> Result<Tensor> {
    /// Below this, `tanh x` equals `x` in f32.
    const LINEAR: f32 = 1.0 / 4096.0;
    // The inverse of the cap can be out of the range of f32. The root of the inverse is not.
    let root = f64::from(cap).recip().sqrt();
    let ratios = ((scores * root)? * root)?;
    let large = (ratios.tanh()? * f64::from(cap))?;
    // A score that is not finite must not become the cap: it stays not finite, and its row is computed again in f64,
    // where the score may be finite.
    ratios.abs()?.lt(LINEAR)?.where_cond(scores, &large)? + (scores * 0.0)?
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn capped_scores_match_f64_for_every_cap() -> Result<()> {
        let sizes = (-40..=38).flat_map(|exponent| [1.0, -3.0].map(|x| (x * 10f64.powi(exponent)) as f32));
        let scores: Vec<f32> = sizes.filter(|x| x.is_finite()).collect();
        let tensor = Tensor::new(scores.as_slice(), &Device::Cpu)?;
        let caps = (-40..=38).map(|exponent| 10f64.powi(exponent) as f32);
        for cap in caps.chain([30.0, 3e38, f32::MAX, f32::MIN_POSITIVE]) {
            for (score, got) in scores.iter().zip(capped(&tensor, cap)?.to_vec1::<f32>()?) {
                let (wide, got) = (f64::from(cap), f64::from(got));
                let truth = wide * (f64::from(*score) / wide).tanh();
                // Subnormal numbers have fewer digits.
                let off = (got - truth).abs() - f64::from(f32::from_bits(1));
                assert!(off <= 1e-6 * truth.abs(), "cap {cap:e}, score {score:e}: {got:e} instead of {truth:e}");
            }
        }
        Ok(())
    }
}
