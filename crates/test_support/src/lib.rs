//! What the tests of several crates share: random numbers, and dense attention in f64 as the reference.
//!
//! It uses nothing of the crates that it tests, not even candle.

/// A generator of random numbers, the same numbers for the same seed.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// A generator that starts with this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `n`, which must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    /// A number in [-1, 1).
    pub fn number(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }

    /// This many numbers in [-1, 1).
    pub fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }
}

/// Dense attention of one token in f64: `softmax(score(scale q kᵀ)) v`, `(heads, head_dim)`, over the keys and values
/// `(_, kv_heads, head_dim)` at the positions `seen`. `score(head, position, product)` turns a product into a score.
#[allow(clippy::too_many_arguments)] // as the formula has
pub fn dense(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    seen: &[usize],
    kv_heads: usize,
    head_dim: usize,
    scale: f64,
    score: impl Fn(usize, usize, f64) -> f64,
) -> Vec<f64> {
    let heads = q.len() / head_dim;
    let mut out = Vec::new();
    for head in 0..heads {
        let at = |token: usize| (token * kv_heads + head / (heads / kv_heads)) * head_dim;
        let q = &q[head * head_dim..][..head_dim];
        let scores: Vec<f64> = seen
            .iter()
            .map(|&t| {
                let product: f64 = q.iter().zip(&k[at(t)..]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                score(head, t, scale * product)
            })
            .collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - highest).exp()).collect();
        let total: f64 = weights.iter().sum();
        for d in 0..head_dim {
            let sum: f64 = seen.iter().zip(&weights).map(|(&t, weight)| weight * f64::from(v[at(t) + d])).sum();
            out.push(sum / total);
        }
    }
    out
}

/// The largest absolute difference, divided by the largest absolute number of the reference. NaN if a difference is
/// NaN.
///
/// # Panics
///
/// If the lengths differ.
pub fn difference(got: &[f32], reference: &[f64]) -> f64 {
    assert_eq!(got.len(), reference.len());
    let largest = reference.iter().fold(0f64, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(reference).map(|(&a, b)| (f64::from(a) - b).abs());
    // `f64::max` would ignore a NaN.
    worst.fold(0f64, |m, x| if x.is_nan() || x > m { x } else { m }) / largest
}
