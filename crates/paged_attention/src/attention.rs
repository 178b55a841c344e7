//! What an attention layer asks for.

use std::sync::Arc;

use block_table::Window;

/// How one attention layer weighs the keys it sees: `softmax(scale * q kᵀ) v`.
///
/// Computed in f32. A row whose result is not finite, because it sees NaN or infinity or because its scores or sums leave the
/// range of f32, is computed again in f64, slowly, and is what it is there.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    pub(crate) scale: f32,
    pub(crate) causal: bool,
    pub(crate) window: Option<Window>,
    pub(crate) soft_cap: Option<f32>,
    pub(crate) slopes: Option<Arc<[f32]>>,
}

impl Attention {
    /// Causal attention with this scale, usually `1 / sqrt(head_dim)`.
    pub fn new(scale: f32) -> Self {
        Self { scale, causal: true, window: None, soft_cap: None, slopes: None }
    }

    /// Causal attention with the scale `1 / sqrt(head_dim)` ("Attention Is All You Need", section 3.2.1).
    pub fn scaled_by(head_dim: usize) -> Self {
        Self::new(1.0 / (head_dim as f32).sqrt())
    }

    /// Whether a token sees only itself and the tokens before it (the default), or all tokens of its sequence.
    #[must_use]
    pub fn causal(self, causal: bool) -> Self {
        Self { causal, ..self }
    }

    /// How far back this layer looks, for models in which only some layers have a window: the blocks behind it are kept for
    /// the others. Where all layers look equally far, give the window to the table instead
    /// ([`TableOptions::window`](crate::TableOptions::window)), which gives the blocks back. Of two windows the smaller
    /// one counts, and of two numbers of sinks.
    #[must_use]
    pub fn window(self, window: Window) -> Self {
        Self { window: Some(window), ..self }
    }

    /// Keeps scores between `-cap` and `cap`: `cap * tanh(score / cap)` (Gemma 2, section 2). `cap` is greater than 0;
    /// infinity means that there is none.
    #[must_use]
    pub fn soft_cap(self, cap: f32) -> Self {
        Self { soft_cap: (cap != f32::INFINITY).then_some(cap), ..self }
    }

    /// Adds `slope * (key's position - query's position)` to the scores, one slope for each query head (ALiBi: "Train Short,
    /// Test Long", Press et al. 2022, section 3). [`alibi_slopes`](Self::alibi_slopes) has the paper's.
    #[must_use]
    pub fn alibi(self, slopes: &[f32]) -> Self {
        Self { slopes: Some(slopes.into()), ..self }
    }

    /// The slopes of the paper for this many query heads: `2^(-8 i / n)` for a power of two `n`; the others are taken from
    /// in between, every second of twice as many.
    pub fn alibi_slopes(heads: usize) -> Vec<f32> {
        let of = |n: usize| (1..=n).map(move |i| (-8.0 * i as f32 / n as f32).exp2());
        let whole = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
        of(whole).chain(of(2 * whole).step_by(2)).take(heads).collect()
    }

    /// What queries are multiplied with before they meet keys: their products are scores in powers of two, or, if these are
    /// to be capped, scores.
    pub(crate) fn factor(&self) -> f32 {
        if self.soft_cap.is_some() { self.scale } else { self.scale * std::f32::consts::LOG2_E }
    }

    /// The slope of a query head.
    #[inline]
    pub(crate) fn slope(&self, head: usize) -> Option<f32> {
        self.slopes.as_ref().and_then(|slopes| slopes.get(head).copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_the_paper() {
        assert!(Attention::alibi_slopes(0).is_empty());
        let eight: Vec<f32> = (1..=8).map(|i| 0.5f32.powi(i)).collect();
        assert_eq!(Attention::alibi_slopes(8), eight);
        let twelve = Attention::alibi_slopes(12);
        assert_eq!(twelve[..8], eight);
        for (slope, power) in twelve[8..].iter().zip([0.5f32, 1.5, 2.5, 3.5]) {
            assert!((slope - (-power).exp2()).abs() < 1e-6);
        }
    }
}
