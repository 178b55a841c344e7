//! The plan of a step: the rows, blocks and slots of its sequences. It is computed once and read by every layer.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use block_table::{BlockTable, Span};

use crate::{Attention, cpu};

/// One sequence of a plan.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    /// The rows of the sequence in q, k and v.
    pub(crate) rows: Range<usize>,
    /// The position of the first new token, which is the number of tokens before it.
    pub(crate) start: usize,
    /// How many tokens the table counts before its position 0. They were freed and are not attended to.
    pub(crate) dropped: usize,
    /// The range of its blocks in [`Plan::blocks`]. They have a slot for each of its tokens that was not freed.
    pub(crate) blocks: Range<usize>,
    /// The number of tokens, including the new ones.
    pub(crate) tokens: usize,
    /// Which tokens a token of the sequence sees in this group of layers.
    pub(crate) span: Span,
    /// Positions whose tokens see each other, in ascending order.
    bidirectional: Vec<Range<usize>>,
    /// The logical blocks that the window has freed.
    freed: Range<usize>,
}

/// The positions that a token sees: `0..sink_tokens` and `recent`, which begins at `sink_tokens` or later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VisibleRange {
    pub(crate) sink_tokens: usize,
    pub(crate) recent: Range<usize>,
}

impl VisibleRange {
    /// The intersection with `positions`, counted from `positions.start`.
    #[inline]
    pub(crate) fn within(&self, positions: &Range<usize>) -> Self {
        let within = |position: usize| position.clamp(positions.start, positions.end) - positions.start;
        Self { sink_tokens: within(self.sink_tokens), recent: within(self.recent.start)..within(self.recent.end) }
    }
}

impl Planned {
    /// Queries from position `start` on, over the first `tokens` tokens of their sequence. It has no blocks.
    pub(crate) fn of_queries(rows: Range<usize>, start: usize, tokens: usize, span: Span) -> Self {
        Self { rows, start, dropped: 0, blocks: 0..0, tokens, span, bidirectional: Vec::new(), freed: 0..0 }
    }

    /// The number of tokens, including the new ones.
    pub(crate) fn len(&self) -> usize {
        self.tokens
    }

    /// The index, among its blocks, of the logical block `block`. `None` if that block was freed.
    #[inline]
    pub(crate) fn index_of(&self, block: usize) -> Option<usize> {
        let Range { start, end } = self.freed;
        if block < start { Some(block) } else { block.checked_sub(end - start).filter(|&at| at >= start) }
    }

    /// The positions of the tokens that its blocks hold, in ascending order.
    pub(crate) fn positions(&self, block_size: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        let (len, freed) = (self.len(), self.freed.clone());
        (0..len.min(freed.start * block_size)).chain(freed.end * block_size..len)
    }

    /// The tokens that the token at `position` sees although they come after it, or before its window.
    #[inline]
    fn together(&self, position: usize) -> Option<&Range<usize>> {
        if self.bidirectional.is_empty() {
            return None;
        }
        let next = self.bidirectional.partition_point(|range| range.end <= position);
        self.bidirectional.get(next).filter(|range| range.start <= position)
    }

    /// The first position that new token number `token` sees and whose block was freed.
    pub(crate) fn freed_but_seen(&self, token: usize, attention: &Attention, block_size: usize) -> Option<usize> {
        // Sink tokens are never freed.
        let recent = self.visible(token, attention).recent;
        let (freed_start, freed_end) = (self.freed.start * block_size, self.freed.end * block_size);
        let seen = recent.start.max(freed_start);
        (seen < recent.end.min(freed_end)).then_some(seen)
    }

    /// The same, where the window has freed these logical blocks.
    pub(crate) fn with_freed(self, freed: Range<usize>) -> Self {
        Self { freed, ..self }
    }

    /// The positions that new token number `token` sees. Later tokens see no earlier range: of two tokens, the one that
    /// comes first has the first sink tokens, the first start and the first end.
    #[inline]
    pub(crate) fn visible(&self, token: usize, attention: &Attention) -> VisibleRange {
        let position = self.start + token;
        let mut end = if attention.causal { self.len().min(position + 1) } else { self.len() };
        let span = self.span.narrowed_by(attention.window);
        let mut start = span.start(position);
        if let Some(together) = self.together(position) {
            (start, end) = (start.min(together.start), end.max(together.end));
        }
        let sink_tokens = span.sink_tokens().min(end);
        VisibleRange { sink_tokens, recent: start.max(sink_tokens).min(end)..end }
    }
}

/// All sequences of a step in one group of layers, packed one after the other.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    group: usize,
    pub(crate) sequences: Vec<Planned>,
    /// The block ids of all sequences.
    pub(crate) blocks: Vec<u32>,
    /// For each row, the slot that its key and value are written to.
    pub(crate) slot_mapping: Vec<u32>,
    /// Found by the first layer that asks.
    shared: Mutex<Option<Arc<cpu::Shared>>>,
}

impl Plan {
    /// An empty plan for the layers of a group.
    pub(crate) fn of_group(group: usize) -> Self {
        Self { group, ..Self::default() }
    }

    /// Adds `n` new tokens of a sequence, for which `table` has reserved slots. Those in each of the ranges
    /// `bidirectional` see each other.
    pub(crate) fn push(&mut self, table: &BlockTable, n: usize, bidirectional: &[Range<usize>]) {
        let block_size = table.pool().block_size();
        let rows = self.slot_mapping.len()..self.slot_mapping.len() + n;
        let (freed, dropped) = freed_of(table, self.group);
        let start = table.len() - dropped;
        let blocks = self.push_blocks(table, start + n, &freed);
        // New tokens come after the freed blocks.
        let own = &self.blocks[blocks.clone()];
        let slot = |at: usize| own[at / block_size - freed.len()] * block_size as u32 + (at % block_size) as u32;
        self.slot_mapping.extend((start..start + n).map(slot));
        let span = table.span_of_group(self.group);
        let bidirectional = bidirectional.iter().map(|range| start + range.start..start + range.end).collect();
        self.add(Planned { rows, start, dropped, blocks, tokens: start + n, span, bidirectional, freed });
    }

    /// Adds `rows` queries that are not new tokens of the table. The first query is at position `at` of the table, and
    /// the queries attend to the tokens before position `end`. `at` may be beyond `end`.
    pub(crate) fn push_queries(&mut self, table: &BlockTable, rows: usize, at: usize, end: usize) {
        let (freed, dropped) = freed_of(table, self.group);
        let (start, tokens) = (at.saturating_sub(dropped), end.saturating_sub(dropped));
        let blocks = self.push_blocks(table, tokens, &freed);
        let (rows, span) = (self.next_rows(rows), table.span_of_group(self.group));
        let bidirectional = Vec::new();
        self.add(Planned { rows, start, dropped, blocks, tokens, span, bidirectional, freed });
    }

    /// Adds `rows` queries, the last of the `tokens` tokens of a sequence, whose blocks are these.
    pub(crate) fn push_last(&mut self, rows: usize, tokens: usize, ids: impl IntoIterator<Item = u32>) {
        let first = self.blocks.len();
        self.blocks.extend(ids);
        let planned = Planned::of_queries(self.next_rows(rows), tokens.saturating_sub(rows), tokens, Span::all());
        self.add(Planned { blocks: first..self.blocks.len(), ..planned });
    }

    /// Adds a sequence. What sequences share is found anew.
    fn add(&mut self, planned: Planned) {
        self.sequences.push(planned);
        self.shared = Mutex::default();
    }

    fn next_rows(&self, n: usize) -> Range<usize> {
        let before = self.sequences.last().map_or(0, |planned| planned.rows.end);
        before..before + n
    }

    /// Appends the blocks that hold the first `tokens` tokens of a table. Returns their range in [`Plan::blocks`].
    fn push_blocks(&mut self, table: &BlockTable, tokens: usize, freed: &Range<usize>) -> Range<usize> {
        let first = self.blocks.len();
        let blocks = tokens.div_ceil(table.pool().block_size());
        let kept = blocks.min(freed.start).max(blocks.saturating_sub(freed.len()));
        self.blocks.extend(table.blocks_of_group(self.group).iter().take(kept).map(|id| id.index() as u32));
        first..self.blocks.len()
    }

    /// The number of new tokens of all sequences.
    pub(crate) fn rows(&self) -> usize {
        self.slot_mapping.len()
    }

    /// Which sequences read the same blocks, for at least `fewest_tokens`.
    pub(crate) fn shared(&self, block_size: usize, fewest_tokens: usize) -> Arc<cpu::Shared> {
        let mut found = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        match &*found {
            Some(shared) if shared.fewest_tokens == fewest_tokens => Arc::clone(shared),
            _ => Arc::clone(found.insert(Arc::new(cpu::Shared::of(self, block_size, fewest_tokens)))),
        }
    }

    /// A plan that only writes.
    pub(crate) fn of_slots(slot_mapping: Vec<u32>) -> Self {
        Self { slot_mapping, ..Self::default() }
    }
}

/// The logical blocks that a window has freed in a group, and how many tokens are dropped at the start of the sequence.
///
/// With a window no token is dropped. Without a window the range is empty, and all tokens that the table has freed
/// ([`BlockTable::free_before`]) are dropped: they are not part of the sequence that is attended to.
pub(crate) fn freed_of(table: &BlockTable, group: usize) -> (Range<usize>, usize) {
    let freed = table.freed_blocks_of_group(group);
    match table.span_of_group(group).is_all() {
        true => (0..0, freed.len() * table.pool().block_size()),
        false => (freed, 0),
    }
}

#[cfg(test)]
mod tests {
    use block_table::Window;

    use super::*;

    #[test]
    fn a_token_sees_the_sink_tokens_and_its_window() {
        let window = |tokens, sink_tokens| Some(Window::new(tokens).with_sink_tokens(sink_tokens));
        let with_image = |window: Option<Window>| Planned {
            rows: 0..4,
            start: 10,
            dropped: 0,
            blocks: 0..0,
            tokens: 14,
            span: Span::all().narrowed_by(window),
            bidirectional: std::iter::once(11..13).collect(),
            freed: 0..0,
        };
        let planned = |window| Planned { bidirectional: Vec::new(), ..with_image(window) };
        let attention = Attention::new(1.0);
        let visible = |window, token| planned(window).visible(token, &attention);
        assert_eq!(visible(None, 1), VisibleRange { sink_tokens: 0, recent: 0..12 });
        assert_eq!(visible(window(3, 2), 0), VisibleRange { sink_tokens: 2, recent: 8..11 });
        assert_eq!(visible(window(1, 0), 3), VisibleRange { sink_tokens: 0, recent: 13..14 });
        assert_eq!(visible(window(10, 4), 0), VisibleRange { sink_tokens: 4, recent: 4..11 });
        assert_eq!(visible(window(3, 50), 0), VisibleRange { sink_tokens: 11, recent: 11..11 });
        assert_eq!(
            planned(window(3, 2)).visible(0, &attention.clone().causal(false)),
            VisibleRange { sink_tokens: 2, recent: 8..14 }
        );
        let narrower = attention.clone().window(Window::new(2).with_sink_tokens(9));
        assert_eq!(planned(window(3, 2)).visible(0, &narrower), VisibleRange { sink_tokens: 2, recent: 9..11 });
        assert_eq!(planned(None).visible(0, &narrower), VisibleRange { sink_tokens: 9, recent: 9..11 });
        let ranges = |window| [0, 1, 2, 3].map(|token| with_image(window).visible(token, &attention).recent);
        assert_eq!(ranges(None), [0..11, 0..13, 0..13, 0..14]);
        assert_eq!(ranges(window(1, 0)), [10..11, 11..13, 11..13, 13..14]);
        assert_eq!(ranges(window(3, 0)), [8..11, 9..13, 10..13, 11..14]);
        assert_eq!(visible(window(3, 2), 0).within(&(1..9)), VisibleRange { sink_tokens: 1, recent: 7..8 });
        assert_eq!(visible(window(3, 2), 0).within(&(4..8)), VisibleRange { sink_tokens: 0, recent: 4..4 });
    }

    #[test]
    fn queries_after_a_segment_see_all_of_it() {
        let planned = Planned::of_queries(0..4, 10, 8, Span::all());
        let attention = Attention::new(1.0);
        assert_eq!(planned.visible(0, &attention), VisibleRange { sink_tokens: 0, recent: 0..8 });
        assert_eq!(
            planned.visible(0, &attention.clone().window(Window::new(5))),
            VisibleRange { sink_tokens: 0, recent: 6..8 }
        );
        assert_eq!(
            planned.visible(3, &attention.window(Window::new(2))),
            VisibleRange { sink_tokens: 0, recent: 8..8 }
        );
    }

    #[test]
    fn freed_blocks_have_no_index() {
        let planned = Planned { blocks: 0..3, freed: 1..3, ..Planned::of_queries(0..2, 18, 20, Span::all()) };
        assert_eq!([0, 1, 2, 3, 4].map(|block| planned.index_of(block)), [Some(0), None, None, Some(1), Some(2)]);
        assert_eq!(planned.positions(4).collect::<Vec<_>>(), [0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 18, 19]);
    }
}
