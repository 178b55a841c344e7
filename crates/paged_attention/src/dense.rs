//! One row of attention in f64, number by number: for what f32 cannot compute, because the row sees numbers that are not
//! finite, or because its scores or sums leave the range of f32. Rare, and slow.

use crate::Attention;
use crate::plan::Sight;

/// One query head of one new token.
pub(crate) struct Row<'a> {
    /// `(head_dim)`.
    pub(crate) q: &'a [f32],
    /// Its number among the query heads.
    pub(crate) head: usize,
    /// The token's position.
    pub(crate) position: usize,
    /// What it sees.
    pub(crate) seen: Sight,
    pub(crate) attention: &'a Attention,
}

impl Row<'_> {
    /// Writes the weighted mean of the values that the row sees to `out (head_dim)`, and returns the logarithm, to base two,
    /// of the sum of their weights. Zeros and -inf if it sees nothing.
    ///
    /// `load(position, k, v)` reads the key and the value of a token in the row's key head, or returns `false` if they are
    /// no longer held.
    pub(crate) fn attend(&self, load: impl Fn(usize, &mut [f32], &mut [f32]) -> bool, out: &mut [f32]) -> f32 {
        let [mut k, mut v] = [(); 2].map(|()| vec![0f32; out.len()]);
        let mut scores = Vec::new();
        for position in (0..self.seen.sinks).chain(self.seen.recent.clone()) {
            if !load(position, &mut k, &mut v) {
                continue;
            }
            let score = self.score(position, &k);
            if score.is_nan() {
                // So is every weight.
                out.fill(f32::NAN);
                return f32::NAN;
            }
            scores.push((position, score));
        }
        if scores.is_empty() {
            out.fill(0.0);
            return f32::NEG_INFINITY;
        }
        let largest = scores.iter().fold(f64::NEG_INFINITY, |largest, (_, score)| largest.max(*score));
        let (mut total, mut sums) = (0f64, vec![0f64; out.len()]);
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
