//! The sliding window: which tokens a token sees.

/// A sliding window with sink tokens: a token sees the last `tokens` tokens, itself included, and the first
/// `sink_tokens` tokens of its sequence ("Efficient Streaming Language Models with Attention Sinks", Xiao et al. 2023,
/// section 3; unlike there, positions are not renumbered).
///
/// A table keeps what its *next* token sees. The window of its last token begins one position earlier. To attend with
/// the last token again, or to read what it sees, give the table a window that is one token longer.
///
/// Blocks that lie wholly before the window are freed. So a sequence of any length uses the blocks of its window and of
/// its sink tokens, each rounded up to whole blocks, and one more block where the window begins inside one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Window {
    tokens: usize,
    sink_tokens: usize,
}

impl Window {
    /// Makes a window of the last `tokens` tokens. A token always sees itself: 0 counts as 1.
    pub fn new(tokens: usize) -> Self {
        Self { tokens: tokens.max(1), sink_tokens: 0 }
    }

    /// Adds the first `sink_tokens` tokens of the sequence.
    #[must_use]
    pub fn with_sink_tokens(self, sink_tokens: usize) -> Self {
        Self { sink_tokens, ..self }
    }

    /// How many tokens a token sees, itself included, in addition to the sink tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// How many tokens at the start of the sequence every token sees.
    pub fn sink_tokens(&self) -> usize {
        self.sink_tokens
    }

    /// The first position of the window of the token at `position`. Sink tokens lie outside of it or overlap with it.
    pub fn start(&self, position: usize) -> usize {
        position.saturating_sub(self.tokens.saturating_sub(1))
    }
}
