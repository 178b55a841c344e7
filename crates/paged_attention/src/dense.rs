//! Attention of one row in f64, number by number. Used for rows that f32 cannot compute: rows that see numbers that are
//! not finite, and rows whose scores or sums leave the range of f32. This is slow, and such rows are rare.

use crate::Attention;
use crate::plan::VisibleRange;

/// A row: one query head of one new token.
pub(crate) struct Row<'a> {
    /// `(head_dim)`.
    pub(crate) q: &'a [f32],
    /// The index of the query head.
    pub(crate) head: usize,
    /// The position of the token.
    pub(crate) position: usize,
    /// The positions that the token sees.
    pub(crate) seen: VisibleRange,
    pub(crate) attention: &'a Attention,
}

impl Row<'_> {
    /// Writes the weighted mean of the values that the row sees to `out (value_dim)`, and returns the base-2 logarithm
    /// of the sum of their weights, that of a sink logit included. If the row sees nothing, it writes zeros; the sum is
    /// then the weight of the sink logit, or zero.
    ///
    /// `load(position, k, v)` reads the key and the value of a token in the row's key head. It returns `false` if the
    /// token has no slot any more.
    pub(crate) fn attend(&self, load: impl Fn(usize, &mut [f32], &mut [f32]) -> bool, out: &mut [f32]) -> f32 {
        let (mut k, mut v) = (vec![0f32; self.q.len()], vec![0f32; out.len()]);
        let sink = self.attention.sink_logit(self.head).map_or(f64::NEG_INFINITY, f64::from);
        let mut scores = Vec::new();
        for position in (0..self.seen.sink_tokens).chain(self.seen.recent.clone()) {
            if !load(position, &mut k, &mut v) {
                continue;
            }
            let score = self.score(position, &k);
            if score.is_nan() {
                // Every weight is NaN, too.
                out.fill(f32::NAN);
                return f32::NAN;
            }
            scores.push((position, score));
        }
        if scores.is_empty() {
            out.fill(0.0);
            return (sink * std::f64::consts::LOG2_E) as f32;
        }
        let largest = scores.iter().fold(sink, |largest, (_, score)| largest.max(*score));
        // Without a sink logit the weight is not -inf minus -inf, which would be NaN.
        let mut total = if sink == f64::NEG_INFINITY { 0.0 } else { (sink - largest).exp() };
        let mut sums = vec![0f64; out.len()];
        for (position, score) in scores {
            load(position, &mut k, &mut v);
            let weight = (score - largest).exp();
            total += weight;
            sums.iter_mut().zip(&v).for_each(|(sum, v)| *sum += weight * f64::from(*v));
        }
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = (sum / total) as f32);
        (largest * std::f64::consts::LOG2_E + total.log2()) as f32
    }

    fn score(&self, position: usize, k: &[f32]) -> f64 {
        let product: f64 = self.q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
        let score = product * f64::from(self.attention.scale);
        let capped = self.attention.soft_cap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh());
        match self.attention.slope(self.head) {
            Some(slope) => capped + f64::from(slope) * (position as f64 - self.position as f64),
            None => capped,
        }
    }
}
