//! Rows whose result is not finite, computed again.
//!
//! Kernels weigh whole tiles. What a row does not see weighs zero, and zero times a value that is not finite is not a number:
//! it would reach rows that do not see it. To look for such values beforehand would cost every tile; to look at a row's
//! result costs next to nothing, and all that is not finite shows there.
//!
//! Such a row is computed a second time by the same kernel, over tiles without the values that it does not see. Their weights
//! are zero, so the result is, to the last bit, what it is beside ordinary numbers. If that is not finite either, then what
//! the row sees is not, or its scores or sums leave the range of f32, and the row is computed in f64. What is done follows
//! from the row's own numbers alone.

use super::Call;
use super::algorithm::{Attend, Scratch, Task, chunks};
use super::format::{Format, Number};
use super::queries::Queries;
use super::state::State;
use super::tile::Blocks;
use crate::dense::Row;
use crate::plan::Span;

/// What rows are computed from.
pub(super) struct Source<'a, F: Format, S> {
    pub(super) call: &'a Call<'a>,
    pub(super) layer: &'a [F::Number],
    pub(super) queries: Queries<'a, S>,
}

/// A new token of a sequence, and a key head.
pub(super) struct Rows<'a> {
    pub(super) span: &'a Span,
    /// Counted in the sequence's part of the step.
    pub(super) token: usize,
    pub(super) head: usize,
}

impl<'a, F: Format, S: Number> Source<'a, F, S> {
    pub(super) fn blocks(&self, span: &'a Span, only_seen: bool) -> Blocks<'a, F::Number> {
        let Call { layout, plan, .. } = *self.call;
        Blocks { layer: self.layer, layout, ids: &plan.blocks[span.blocks.clone()], span, only_seen }
    }

    /// Computes number `member` of a token's query heads in a key head again. Writes the mean to `mean`, and returns the
    /// logarithm of the weights. `state` is kept for the other members.
    pub(super) fn again(
        &self,
        rows: &Rows<'a>,
        member: usize,
        mean: &mut [f32],
        state: &mut Option<State>,
        scratch: &mut Scratch<F>,
    ) -> f32 {
        let Rows { span, token, head } = *rows;
        let attention = self.call.attention;
        let seen = span.sight(token, attention);
        let query_head = head * self.group() + member;
        let mut q = vec![0f32; mean.len()];
        self.queries.widen(span.rows.start + token, query_head, &mut q);
        // Otherwise every score is affected.
        if q.iter().all(|x| x.is_finite()) {
            let state = state.get_or_insert_with(|| self.only_seen(rows, scratch));
            state.mean(member, mean);
            if state.is_finite(member, mean) {
                return state.log_weight(member);
            }
        }
        let blocks = self.blocks(span, true);
        let block_size = self.call.layout.block_size;
        let load = |position: usize, k: &mut [f32], v: &mut [f32]| {
            let block = blocks.block(position);
            block.map(|block| F::load(self.call.layout, block, position % block_size, head, k, v)).is_some()
        };
        Row { q: &q, head: query_head, position: span.start + token, seen, attention }.attend(load, mean)
    }

    /// The states of a token's query heads in a key head, without the values that the token does not see.
    fn only_seen(&self, &Rows { span, token, head }: &Rows<'a>, scratch: &mut Scratch<F>) -> State {
        let Call { layout, attention, kernel, .. } = *self.call;
        let (tokens, heads) = (token..token + 1, head..head + 1);
        let mut queries = F::Queries::default();
        self.queries.prepare::<F>(span, &tokens, &heads, layout.kv_heads, &mut queries);
        let seen = span.sight(token, attention);
        let task = Task {
            blocks: self.blocks(span, true),
            attention,
            queries: &queries,
            group: self.group(),
            heads,
            tokens,
            chunks: chunks(&[0..seen.sinks, seen.recent]),
        };
        kernel.run(Attend(&task, scratch))
    }

    /// Query heads of a key head.
    pub(super) fn group(&self) -> usize {
        self.call.heads / self.call.layout.kv_heads
    }
}
