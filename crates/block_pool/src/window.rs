//! How far back a sequence looks.

/// A sliding window with attention sinks: a token sees the last `tokens` tokens, itself included, and the first `sinks`
/// tokens of its sequence ("Efficient Streaming Language Models with Attention Sinks", Xiao et al. 2023, section 3;
/// here positions go on counting instead of being renumbered).
///
/// A table holds what its *next* token sees. What its last token has seen begins one position earlier: whoever attends
/// with it again, or reads what it sees, gives the table a window of one token more.
///
/// Blocks that lie wholly before the window are freed, so that a sequence of any length takes the memory of its
/// window and its sinks, each rounded up to whole blocks, and of one more block where the window begins inside one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Window {
    tokens: usize,
    sinks: usize,
}

impl Window {
    /// The last `tokens` tokens. A token always sees itself: 0 counts as 1.
    pub fn new(tokens: usize) -> Self {
        Self { tokens: tokens.max(1), sinks: 0 }
    }

    /// And the first `sinks` tokens of the sequence.
    #[must_use]
    pub fn with_sinks(self, sinks: usize) -> Self {
        Self { sinks, ..self }
    }

    /// How many tokens a token sees, itself included, in addition to the sinks.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// How many tokens at the start of the sequence every token sees.
    pub fn sinks(&self) -> usize {
        self.sinks
    }

    /// The first position after the sinks that the token at `position` sees.
    pub fn start(&self, position: usize) -> usize {
        position.saturating_sub(self.tokens.saturating_sub(1))
    }

    /// How many blocks after those of the sinks the next token of a sequence of `len` tokens does not see any more:
    /// they hold nothing but tokens before its window.
    pub fn passed_blocks(&self, len: usize, block_size: usize) -> usize {
        (self.start(len) / block_size).saturating_sub(self.sink_blocks(block_size))
    }

    /// How many blocks the sinks take.
    pub fn sink_blocks(&self, block_size: usize) -> usize {
        self.sinks.div_ceil(block_size)
    }
}
