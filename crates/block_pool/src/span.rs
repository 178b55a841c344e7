//! The span of a group of layers: how far back its tokens look.

use std::num::NonZeroUsize;

use crate::Window;

/// Which earlier tokens the layers of a group attend to: all of them, those of a sliding [`Window`], or those of the
/// same chunk. A pool frees the blocks that no later token of a sequence sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Span {
    window: Option<Window>,
    chunk: Option<NonZeroUsize>,
}

impl Span {
    /// A token sees all tokens before it.
    pub const fn all() -> Self {
        Self { window: None, chunk: None }
    }

    /// A token sees the tokens of its window.
    pub const fn window(window: Window) -> Self {
        Self { window: Some(window), chunk: None }
    }

    /// Tokens are cut into chunks of `n`, counted from the start of the sequence, and a token sees the tokens before it
    /// in its own chunk (Llama 4: "chunked attention"). 0 counts as 1.
    pub const fn chunks(n: usize) -> Self {
        let chunk = match NonZeroUsize::new(n) {
            Some(n) => n,
            None => NonZeroUsize::MIN,
        };
        Self { window: None, chunk: Some(chunk) }
    }

    /// The tokens that are in this span and in the window: of two windows, the smaller one applies, and the smaller
    /// number of sink tokens.
    #[must_use]
    pub fn narrowed_by(self, window: Option<Window>) -> Self {
        let window = match (self.window, window) {
            (Some(a), Some(b)) => {
                Some(Window::new(a.tokens().min(b.tokens())).with_sink_tokens(a.sink_tokens().min(b.sink_tokens())))
            }
            (a, b) => a.or(b),
        };
        Self { window, ..self }
    }

    /// Whether a token sees all tokens before it.
    #[inline]
    pub fn is_all(&self) -> bool {
        self.window.is_none() && self.chunk.is_none()
    }

    /// The sliding window, if there is one.
    pub fn sliding_window(&self) -> Option<Window> {
        self.window
    }

    /// How many tokens a chunk has, if tokens see those of their chunk only.
    pub fn chunk_tokens(&self) -> Option<usize> {
        self.chunk.map(NonZeroUsize::get)
    }

    /// How many tokens at the start of the sequence every token sees in addition.
    #[inline]
    pub fn sink_tokens(&self) -> usize {
        match (self.window, self.chunk) {
            (Some(window), None) => window.sink_tokens(),
            _ => 0,
        }
    }

    /// The first position that the token at `position` sees, except for sink tokens.
    #[inline]
    pub fn start(&self, position: usize) -> usize {
        let window = self.window.map_or(0, |window| window.start(position));
        let chunk = self.chunk.map_or(0, |n| position / n * n.get());
        window.max(chunk)
    }

    /// How many blocks the sink tokens take.
    #[inline]
    pub fn sink_blocks(&self, block_size: usize) -> usize {
        self.sink_tokens().div_ceil(block_size)
    }

    /// How many blocks, counted after the blocks of the sink tokens, the next token of a sequence of `len` tokens and
    /// those after it do not see any more.
    #[inline]
    pub fn freed_blocks(&self, len: usize, block_size: usize) -> usize {
        if self.is_all() {
            return 0;
        }
        (self.start(len) / block_size).saturating_sub(self.sink_blocks(block_size))
    }

    /// The most blocks before a token that the token sees, its own included and sink tokens excluded.
    pub(crate) fn reach(&self, block_size: usize) -> usize {
        let window = self.window.map_or(usize::MAX, |window| window.tokens());
        let chunk = self.chunk.map_or(usize::MAX, NonZeroUsize::get);
        window.min(chunk).div_ceil(block_size).saturating_add(1)
    }
}

impl From<Window> for Span {
    fn from(window: Window) -> Self {
        Self::window(window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_starts_where_its_window_or_its_chunk_does() {
        let start = |span: Span| [0, 3, 4, 7, 8, 9].map(|position| span.start(position));
        assert_eq!(start(Span::all()), [0; 6]);
        assert_eq!(start(Span::chunks(4)), [0, 0, 4, 4, 8, 8]);
        assert_eq!(start(Span::window(Window::new(3))), [0, 1, 2, 5, 6, 7]);
        assert_eq!(start(Span::chunks(4).narrowed_by(Some(Window::new(3)))), [0, 1, 4, 5, 8, 8]);
        assert_eq!(start(Span::chunks(0)), start(Span::window(Window::new(1))));
        let sinks = Window::new(9).with_sink_tokens(5);
        assert_eq!(Span::window(Window::new(2).with_sink_tokens(7)).narrowed_by(Some(sinks)).sink_tokens(), 5);
        assert_eq!(Span::chunks(4).narrowed_by(Some(sinks)).sink_tokens(), 0);
    }

    #[test]
    fn blocks_are_freed_when_no_later_token_sees_them() {
        let freed = |span: Span| [0, 4, 7, 8, 9, 12].map(|len| span.freed_blocks(len, 2));
        assert_eq!(freed(Span::all()), [0; 6]);
        assert_eq!(freed(Span::chunks(4)), [0, 2, 2, 4, 4, 6]);
        assert_eq!(freed(Span::chunks(3)), [0, 1, 3, 3, 4, 6]);
        assert_eq!(freed(Span::window(Window::new(3).with_sink_tokens(2))), [0, 0, 1, 2, 2, 4]);
    }
}
