//! Recomputes rows whose result is not finite.
//!
//! Kernels multiply whole tiles. A token that a row does not see has weight zero, but zero times a value that is not
//! finite is NaN: such a value would reach rows that do not see it. Checking every tile for such values would cost time
//! in each of them. Checking a row's result costs next to nothing, and every value that is not finite shows there.
//!
//! Such a row is computed a second time by the same kernel, over tiles without the values that it does not see. Their
//! weights are zero, so the result is, to the last bit, what it would be if they were finite. If it is still not
//! finite, then a key or value that the row sees is not finite, or its scores or sums leave the range of f32, and the
//! row is computed in f64. Which of these computations is used depends only on the numbers of the row itself.

use super::Call;
use super::algorithm::{Attend, NewToken, Scratch, Task, chunks};
use super::format::{Format, Number};
use super::queries::{Prepare, Queries};
use super::state::State;
use super::tile::Blocks;
use crate::dense::Row;
use crate::plan::Planned;

/// The inputs of a call.
pub(super) struct Inputs<'a, F: Format, S> {
    pub(super) call: &'a Call<'a>,
    pub(super) layer: &'a [F::Number],
    pub(super) queries: Queries<'a, S>,
}

/// The rows of one new token in one key head.
pub(super) struct TokenHead<'a> {
    pub(super) planned: &'a Planned,
    /// Index among the sequence's new tokens.
    pub(super) token: usize,
    pub(super) head: usize,
}

impl<'a, F: Format, S: Number> Inputs<'a, F, S> {
    pub(super) fn blocks(&self, planned: &'a Planned, visible_only: bool) -> Blocks<'a, F::Number> {
        let Call { layout, plan, .. } = *self.call;
        Blocks { layer: self.layer, layout, ids: &plan.blocks[planned.blocks.clone()], planned, visible_only }
    }

    /// Recomputes one row: the query head with index `member` in the key head's group. Writes the output to `output`,
    /// and returns the log-sum-exp, to base two. `state` caches the state that all rows of the group share.
    pub(super) fn recompute(
        &self,
        rows: &TokenHead<'a>,
        member: usize,
        output: &mut [f32],
        state: &mut Option<State>,
        scratch: &mut Scratch<F>,
    ) -> f32 {
        let TokenHead { planned, token, head } = *rows;
        let attention = self.call.attention;
        let seen = planned.visible(token, attention);
        let query_head = head * self.group() + member;
        let mut q = vec![0f32; self.call.layout.head_dim];
        self.queries.widen(planned.rows.start + token, query_head, &mut q);
        // A query that is not finite affects every score, so the second pass of the kernel would not help.
        if q.iter().all(|x| x.is_finite()) {
            let state = state.get_or_insert_with(|| self.visible_only_state(rows, scratch));
            if let Some(logit) = attention.sink_logit(query_head) {
                state.add_sink_logit(member, logit);
            }
            state.write_output(member, output);
            if state.is_finite(member, output) {
                return state.lse(member);
            }
        }
        let blocks = self.blocks(planned, true);
        let block_size = self.call.layout.block_size;
        let load = |position: usize, k: &mut [f32], v: &mut [f32]| {
            let block = blocks.block(position);
            block.map(|block| F::load(self.call.layout, block, position % block_size, head, k, v)).is_some()
        };
        Row { q: &q, head: query_head, position: planned.start + token, seen, attention }.attend(load, output)
    }

    /// The states of a token's query heads in a key head, computed without the values that the token does not see.
    fn visible_only_state(
        &self,
        &TokenHead { planned, token, head }: &TokenHead<'a>,
        scratch: &mut Scratch<F>,
    ) -> State {
        let Call { attention, kernel, .. } = *self.call;
        let (tokens, heads) = ([NewToken::of(planned, token, attention)], head..head + 1);
        let mut queries = F::Queries::default();
        let (rows, key_heads) = (&self.queries, &heads);
        kernel.run(Prepare::<F, S> {
            queries: rows,
            tokens: &tokens,
            key_heads,
            group: self.group(),
            to: &mut queries,
        });
        let [NewToken { visible, .. }] = &tokens;
        let task = Task {
            blocks: self.blocks(planned, true),
            attention,
            queries: &queries,
            group: self.group(),
            heads,
            chunks: chunks(&[0..visible.sink_tokens, visible.recent.clone()]),
            tokens: &tokens,
        };
        let mut state = State::new(self.group(), task.blocks.dims());
        kernel.run(Attend(&task, scratch, &mut state));
        state
    }

    /// Query heads per key head.
    pub(super) fn group(&self) -> usize {
        self.call.heads / self.call.layout.kv_heads
    }
}
