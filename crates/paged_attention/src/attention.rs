//! The parameters of an attention layer.

use std::sync::Arc;

use block_table::Window;

/// The parameters of one attention layer: it computes `softmax(scale * q kᵀ) v`.
///
/// Every option works with every kernel, type and block size, and all of them together.
///
/// The arithmetic is in f32. If the result of a row is not finite, the row is computed again in f64, which is slow, and
/// the f64 result is returned. This happens when the row sees NaN or infinity, or when its scores or sums leave the
/// range of f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    pub(crate) scale: f32,
    pub(crate) causal: bool,
    pub(crate) window: Option<Window>,
    pub(crate) soft_cap: Option<f32>,
    pub(crate) slopes: Option<Arc<[f32]>>,
    pub(crate) sink_logits: Option<Arc<[f32]>>,
    pub(crate) shared_reads_from: usize,
}

/// Shorter beginnings stay in a core's cache, from which each sequence reads them about as fast.
const SHARED_READS_FROM: usize = 2048;

impl Attention {
    /// Causal attention with the given scale, usually `1 / sqrt(head_dim)`.
    pub fn new(scale: f32) -> Self {
        Self {
            scale,
            causal: true,
            window: None,
            soft_cap: None,
            slopes: None,
            sink_logits: None,
            shared_reads_from: SHARED_READS_FROM,
        }
    }

    /// Causal attention with the scale `1 / sqrt(head_dim)` ("Attention Is All You Need", section 3.2.1).
    pub fn scaled_by(head_dim: usize) -> Self {
        Self::new(1.0 / (head_dim as f32).sqrt())
    }

    /// Sets whether attention is causal: a token sees itself and the tokens before it. This is the default. Otherwise a
    /// token sees all tokens of its sequence.
    #[must_use]
    pub fn causal(self, causal: bool) -> Self {
        Self { causal, ..self }
    }

    /// Gives this layer a sliding window. The blocks outside the window are kept.
    ///
    /// If the layer always has this window, put it into a group of layers with the window instead
    /// ([`LayerGroup::window`](crate::LayerGroup::window)), or give the window to the table if all layers have it
    /// ([`TableOptions::window`](crate::TableOptions::window)): then the blocks outside the window are freed. Of
    /// several windows the smallest applies, and the smallest number of sink tokens.
    #[must_use]
    pub fn window(self, window: Window) -> Self {
        Self { window: Some(window), ..self }
    }

    /// Keeps scores between `-cap` and `cap`: `cap * tanh(score / cap)` (Gemma 2, section 2). `cap` must be greater
    /// than 0; infinity means no cap.
    #[must_use]
    pub fn soft_cap(self, cap: f32) -> Self {
        Self { soft_cap: (cap != f32::INFINITY).then_some(cap), ..self }
    }

    /// Adds `slope * (key's position - query's position)` to the scores, with one slope for each query head (ALiBi:
    /// "Train Short, Test Long", Press et al. 2022, section 3). [`alibi_slopes`](Self::alibi_slopes) returns the
    /// paper's slopes.
    #[must_use]
    pub fn alibi(self, slopes: &[f32]) -> Self {
        Self { slopes: Some(slopes.into()), ..self }
    }

    /// Adds one learned logit for each query head to the scores that the weights are normalised over (gpt-oss). No
    /// value belongs to it: it takes its share of the weight, and the weights of the tokens add up to less than one. It
    /// is not scaled, capped or biased. A logit of -inf changes nothing.
    ///
    /// *Sink tokens* are something else: the first tokens of a sequence, which a window keeps
    /// ([`Window::with_sink_tokens`]). A layer can have both.
    #[must_use]
    pub fn sink_logits(self, logits: &[f32]) -> Self {
        Self { sink_logits: Some(logits.into()), ..self }
    }

    /// The same attention without sink logits: for parts of the keys that are merged with others, since a sink logit
    /// counts once.
    #[must_use]
    pub fn without_sink_logits(&self) -> Self {
        Self { sink_logits: None, ..self.clone() }
    }

    /// Sets how long the common beginning of several sequences of a step has to be, in tokens, for the fused backend to
    /// read its blocks once for all of them: 2048 by default. A shorter one stays in a core's cache, from which each
    /// sequence reads it about as fast. From 0 on, every chunk of 512 tokens that sequences have in common is read once;
    /// `usize::MAX` reads all of them apart. The results are the same to the last bit.
    #[must_use]
    pub fn shared_reads_from(self, tokens: usize) -> Self {
        Self { shared_reads_from: tokens, ..self }
    }

    /// The slopes of the ALiBi paper for `heads` query heads. If `heads` is a power of two `n`, they are `2^(-8 i / n)`
    /// for `i` from 1 to `n`. Otherwise `n` is the largest power of two below `heads`: the first `n` slopes are those
    /// of `n` heads, and the rest is every second slope of `2 n` heads.
    pub fn alibi_slopes(heads: usize) -> Vec<f32> {
        let of = |n: usize| (1..=n).map(move |i| (-8.0 * i as f32 / n as f32).exp2());
        let whole = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
        of(whole).chain(of(2 * whole).step_by(2)).take(heads).collect()
    }

    /// The factor that queries are multiplied by before the products with keys. With a soft cap it is the scale, and
    /// the products are scores. Otherwise it is `scale * log2(e)`, so that weights are `2^product`.
    pub(crate) fn factor(&self) -> f32 {
        if self.soft_cap.is_some() { self.scale } else { self.scale * std::f32::consts::LOG2_E }
    }

    /// The sink logit of a query head.
    #[inline]
    pub(crate) fn sink_logit(&self, head: usize) -> Option<f32> {
        self.sink_logits.as_ref().and_then(|logits| logits.get(head).copied())
    }

    /// Whether the position of a query matters: for which keys it sees, or for their scores.
    pub(crate) fn depends_on_position(&self) -> bool {
        self.causal || self.window.is_some() || self.slopes.is_some()
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
    fn alibi_slopes_match_the_paper() {
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
