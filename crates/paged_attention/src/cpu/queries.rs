//! The rows of a task: query heads of new tokens, made ready for products.

use std::ops::Range;

use super::format::{Format, ROWS};
use crate::plan::Span;

/// All queries of a step.
#[derive(Clone, Copy)]
pub(super) struct Queries<'a> {
    /// `(tokens, heads, head_dim)`.
    pub(super) numbers: &'a [f32],
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    /// Query heads of a key head.
    pub(super) group: usize,
    /// What each number is multiplied by.
    pub(super) factor: f32,
}

impl Queries<'_> {
    /// Groups of rows that each key head has, for as many new tokens.
    pub(super) fn groups(&self, tokens: usize) -> usize {
        (tokens * self.group).div_ceil(ROWS)
    }

    /// Makes the rows of some new tokens of a sequence ready, key head after key head: in each the tokens times its query
    /// heads, four by four.
    pub(super) fn prepare<F: Format>(
        &self,
        span: &Span,
        tokens: &Range<usize>,
        kv_heads: Range<usize>,
        to: &mut F::Queries,
    ) {
        let Self { numbers, heads, head_dim, group, factor } = *self;
        let rows = tokens.len() * group;
        let row = |head: usize, row: usize| {
            if row >= rows {
                return &[][..];
            }
            let token = span.rows.start + tokens.start + row / group;
            &numbers[(token * heads + head * group + row % group) * head_dim..][..head_dim]
        };
        let groups = kv_heads.flat_map(|head| (0..rows).step_by(ROWS).map(move |first| (head, first)));
        F::prepare(to, groups.map(|(head, first)| std::array::from_fn(|r| row(head, first + r))), factor);
    }
}
