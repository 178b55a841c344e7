//! A step's sequences laid flat, computed once and read by every layer.

use std::ops::Range;

use block_table::{BlockTable, Window};

use crate::Attention;

/// One sequence's part in a step.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    /// Its rows in q, k and v.
    pub(crate) rows: Range<usize>,
    /// The position of its first new token: how many it had before.
    pub(crate) start: usize,
    /// How many tokens its table has given back that are no longer a part of it: position 0 lies behind them.
    pub(crate) behind: usize,
    /// Its blocks in [`Plan::blocks`], enough for all its tokens.
    pub(crate) blocks: Range<usize>,
    /// How many tokens it has, the new ones included.
    pub(crate) tokens: usize,
    /// How far back it looks.
    pub(crate) window: Option<Window>,
    /// How many of its blocks come before those that its window has given back, and how many these are.
    gap: (usize, usize),
}

/// The positions that a token sees: those before `sinks`, and those in `recent`, which begins behind them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sight {
    pub(crate) sinks: usize,
    pub(crate) recent: Range<usize>,
}

impl Sight {
    /// What it is of these positions, counted from their start.
    #[inline]
    pub(crate) fn within(&self, positions: &Range<usize>) -> Self {
        let within = |position: usize| position.clamp(positions.start, positions.end) - positions.start;
        Self { sinks: within(self.sinks), recent: within(self.recent.start)..within(self.recent.end) }
    }
}

impl Span {
    /// Queries that are tokens from position `start` on, over the `tokens` first of their sequence, wherever these lie.
    pub(crate) fn of_queries(rows: Range<usize>, start: usize, tokens: usize, window: Option<Window>) -> Self {
        Self { rows, start, behind: 0, blocks: 0..0, tokens, window, gap: (0, 0) }
    }

    /// How many tokens it has, the new ones included.
    pub(crate) fn len(&self) -> usize {
        self.tokens
    }

    /// Where in its blocks the one of logical index `block` is, unless it has been given back.
    #[inline]
    pub(crate) fn place(&self, block: usize) -> Option<usize> {
        let (before, missing) = self.gap;
        if block < before { Some(block) } else { block.checked_sub(missing).filter(|&at| at >= before) }
    }

    /// The positions of the tokens that its blocks hold, in their order.
    pub(crate) fn held(&self, block_size: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        let (before, missing) = self.gap;
        let len = self.len();
        (0..len.min(before * block_size)).chain((before + missing) * block_size..len)
    }

    /// What its new token number `token` sees.
    #[inline]
    pub(crate) fn sight(&self, token: usize, attention: &Attention) -> Sight {
        let position = self.start + token;
        let end = if attention.causal { self.len().min(position + 1) } else { self.len() };
        let window = match (self.window, attention.window) {
            (Some(a), Some(b)) => Some(Window::new(a.tokens().min(b.tokens())).with_sinks(a.sinks().min(b.sinks()))),
            (a, b) => a.or(b),
        };
        let (sinks, start) = window.map_or((0, 0), |window| (window.sinks().min(end), window.start(position)));
        Sight { sinks, recent: start.max(sinks).min(end)..end }
    }
}

/// All sequences of a step, packed one behind the other.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) spans: Vec<Span>,
    /// Block rows of all sequences.
    pub(crate) blocks: Vec<u32>,
    /// For each row the slot its key and value go to.
    pub(crate) slots: Vec<u32>,
}

impl Plan {
    /// Adds `n` new tokens of a sequence, for which `table` has room.
    pub(crate) fn push(&mut self, table: &BlockTable, n: usize) {
        let block_size = table.pool().block_size();
        let rows = self.slots.len()..self.slots.len() + n;
        let (gap, behind) = gap_of(table);
        let start = table.len() - behind;
        let blocks = self.take(table, start + n, gap);
        // New tokens come behind all gaps.
        let own = &self.blocks[blocks.clone()];
        let slot = |at: usize| own[at / block_size - gap.1] * block_size as u32 + (at % block_size) as u32;
        self.slots.extend((start..start + n).map(slot));
        self.spans.push(Span { rows, start, behind, blocks, tokens: start + n, window: table.window(), gap });
    }

    /// Adds queries that are not new tokens of the table: `rows` of them, the first `at` tokens behind the table's first,
    /// over the tokens before `end`. They may come after all of these.
    pub(crate) fn push_queries(&mut self, table: &BlockTable, rows: usize, at: usize, end: usize) {
        let (gap, behind) = gap_of(table);
        let (start, tokens) = (at.saturating_sub(behind), end.saturating_sub(behind));
        let blocks = self.take(table, tokens, gap);
        let before = self.spans.last().map_or(0, |span| span.rows.end);
        self.spans.push(Span {
            rows: before..before + rows,
            start,
            behind,
            blocks,
            tokens,
            window: table.window(),
            gap,
        });
    }

    /// Takes over the blocks that hold the first `tokens` of a table; returns where they are.
    fn take(&mut self, table: &BlockTable, tokens: usize, (before, missing): (usize, usize)) -> Range<usize> {
        let first = self.blocks.len();
        let blocks = tokens.div_ceil(table.pool().block_size());
        let held = blocks.min(before).max(blocks.saturating_sub(missing));
        self.blocks.extend(table.blocks().iter().take(held).map(|id| id.index() as u32));
        first..self.blocks.len()
    }

    /// New tokens of all sequences.
    pub(crate) fn rows(&self) -> usize {
        self.slots.len()
    }
}

/// How many of a table's blocks come before those that it has given back, and how many these are; and how many of its tokens
/// do not count: without a window, what it has given back is not a part of it, and it begins behind.
pub(crate) fn gap_of(table: &BlockTable) -> ((usize, usize), usize) {
    let gap = table.gap();
    if table.window().is_some() { (gap, 0) } else { ((0, 0), gap.1 * table.pool().block_size()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_sees_the_sinks_and_its_window() {
        let window = |tokens, sinks| Some(Window::new(tokens).with_sinks(sinks));
        let span = |window| Span { rows: 0..4, start: 10, behind: 0, blocks: 0..0, tokens: 14, window, gap: (0, 0) };
        let attention = Attention::new(1.0);
        let sight = |window, token| span(window).sight(token, &attention);
        assert_eq!(sight(None, 1), Sight { sinks: 0, recent: 0..12 });
        assert_eq!(sight(window(3, 2), 0), Sight { sinks: 2, recent: 8..11 });
        assert_eq!(sight(window(1, 0), 3), Sight { sinks: 0, recent: 13..14 });
        assert_eq!(sight(window(10, 4), 0), Sight { sinks: 4, recent: 4..11 });
        assert_eq!(sight(window(3, 50), 0), Sight { sinks: 11, recent: 11..11 });
        assert_eq!(span(window(3, 2)).sight(0, &attention.clone().causal(false)), Sight { sinks: 2, recent: 8..14 });
        let narrower = attention.clone().window(Window::new(2).with_sinks(9));
        assert_eq!(span(window(3, 2)).sight(0, &narrower), Sight { sinks: 2, recent: 9..11 });
        assert_eq!(span(None).sight(0, &narrower), Sight { sinks: 9, recent: 9..11 });
        assert_eq!(sight(window(3, 2), 0).within(&(1..9)), Sight { sinks: 1, recent: 7..8 });
        assert_eq!(sight(window(3, 2), 0).within(&(4..8)), Sight { sinks: 0, recent: 4..4 });
    }

    #[test]
    fn queries_behind_a_part_see_all_of_it() {
        let span = Span { rows: 0..4, start: 10, behind: 0, blocks: 0..0, tokens: 8, window: None, gap: (0, 0) };
        let attention = Attention::new(1.0);
        assert_eq!(span.sight(0, &attention), Sight { sinks: 0, recent: 0..8 });
        assert_eq!(span.sight(0, &attention.clone().window(Window::new(5))), Sight { sinks: 0, recent: 6..8 });
        assert_eq!(span.sight(3, &attention.window(Window::new(2))), Sight { sinks: 0, recent: 8..8 });
    }

    #[test]
    fn positions_behind_the_window_have_no_place() {
        let span = Span { rows: 0..2, start: 18, behind: 0, blocks: 0..3, tokens: 20, window: None, gap: (1, 2) };
        assert_eq!([0, 1, 2, 3, 4].map(|block| span.place(block)), [Some(0), None, None, Some(1), Some(2)]);
        assert_eq!(span.held(4).collect::<Vec<_>>(), [0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 18, 19]);
    }
}
