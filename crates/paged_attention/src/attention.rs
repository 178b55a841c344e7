//! What an attention layer asks for.

/// How one attention layer weighs the keys it sees: `softmax(scale * q kᵀ) v`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    pub(crate) scale: f32,
    pub(crate) causal: bool,
}

impl Attention {
    /// Causal attention with this scale, usually `1 / sqrt(head_dim)`.
    pub fn new(scale: f32) -> Self {
        Self { scale, causal: true }
    }

    /// Causal attention with the scale `1 / sqrt(head_dim)` ("Attention Is All You Need", section 3.2.1).
    pub fn scaled_by(head_dim: usize) -> Self {
        Self::new(1.0 / (head_dim as f32).sqrt())
    }

    /// Whether a token sees only itself and the tokens before it (the default), or all tokens of its sequence.
    pub fn causal(self, causal: bool) -> Self {
        Self { causal, ..self }
    }
}
