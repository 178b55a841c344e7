//! Packs the query rows of new tokens for the products with keys.

use std::ops::Range;

use super::algorithm::NewToken;
use super::format::{Format, Number, ROWS};
use super::wide::{Run, Wide};

/// All queries of a step.
#[derive(Clone, Copy)]
pub(super) struct Queries<'a, S> {
    /// `(tokens, heads, head_dim)`.
    pub(super) numbers: &'a [S],
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    /// What every query is multiplied by.
    pub(super) factor: f32,
}

impl<S: Number> Queries<'_, S> {
    /// Writes one head of the query in row `row` of the step to `to`, as f32.
    pub(super) fn widen(&self, row: usize, head: usize, to: &mut [f32]) {
        S::widen(&self.numbers[(row * self.heads + head) * self.head_dim..][..self.head_dim], to);
    }
}

/// Packs the rows of some new tokens, one key head after another. The rows of a key head are the tokens times the query
/// heads of its group, packed in groups of four.
pub(super) struct Prepare<'a, 'b, F: Format, S> {
    pub(super) queries: &'b Queries<'a, S>,
    pub(super) tokens: &'b [NewToken],
    pub(super) key_heads: &'b Range<usize>,
    /// Query heads per key head.
    pub(super) group: usize,
    pub(super) to: &'b mut F::Queries,
}

impl<F: Format, S: Number> Run for Prepare<'_, '_, F, S> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        let Self { queries, tokens, key_heads, group, to } = self;
        let Queries { head_dim, factor, .. } = *queries;
        let rows = tokens.len() * group;
        let mut wide = vec![0f32; ROWS * head_dim];
        F::clear(to);
        for head in key_heads.clone() {
            for first in (0..rows).step_by(ROWS) {
                let count = ROWS.min(rows - first);
                for (row, wide) in (first..first + count).zip(wide.chunks_exact_mut(head_dim)) {
                    queries.widen(tokens[row / group].row, head * group + row % group, wide);
                }
                F::prepare(to, &wide[..count * head_dim], head_dim, factor);
            }
        }
    }
}
