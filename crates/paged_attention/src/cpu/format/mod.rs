//! How keys and values are stored, and what is computed with them as they are stored.

mod float;
mod int8;

use block_pool::KvLayout;

pub(super) use float::{Float, Number};
pub(super) use int8::Int8;
pub(crate) use int8::MOST_DIMS as MOST_INT8_DIMS;

use super::tile::{Panels, Scores};
use super::wide::{LANES, Wide};

/// Rows that a product takes at a time.
pub(super) const ROWS: usize = 4;

/// A way to store keys and values.
///
/// Panels are runs of sixteen tokens in the order of a [`KvLayout`], or empty where no token is seen. Rows are query heads
/// of new tokens, in groups of up to four.
pub(super) trait Format: 'static {
    /// What a tensor holds.
    type Number: Copy + Default + Send + Sync;
    /// Query rows, made ready for products.
    type Queries: Default + Send + Sync;

    /// Stores one token's key and value in one head of a block.
    fn store(layout: &KvLayout, block: &mut [Self::Number], offset: usize, head: usize, k: &[f32], v: &[f32]);

    /// Reads one token's key and value in one head of a block.
    fn load(layout: &KvLayout, block: &[Self::Number], offset: usize, head: usize, k: &mut [f32], v: &mut [f32]);

    /// The sizes of a whole panel's keys and values when they are copied together with `dims` dimensions.
    fn panel_sizes(head_dim: usize, dims: usize) -> [usize; 2];

    /// Copies one token's key and value from a block to place `at` of a panel of `dims` dimensions.
    fn copy(
        layout: &KvLayout,
        block: &[Self::Number],
        offset: usize,
        head: usize,
        to: (&mut [Self::Number], &mut [Self::Number]),
        at: usize,
        dims: usize,
    );

    /// Takes out all query rows.
    fn clear(queries: &mut Self::Queries);

    /// Adds a group of query rows `(rows, head_dim)`, each times `factor`.
    fn prepare(queries: &mut Self::Queries, rows: &[f32], head_dim: usize, factor: f32);

    /// `scores (rows, panels, sixteen) = q (rows, head_dim) kᵀ` for the rows of a group. Asks for the keys in `next`
    /// meanwhile.
    fn scores<V: Wide>(
        queries: &Self::Queries,
        group: usize,
        keys: &Panels<'_, Self::Number>,
        next: Option<&Panels<'_, Self::Number>>,
        scores: &mut [Scores],
    );

    /// `sums (rows, dims) += weights (rows, tokens) v (tokens, dims)` for the first `tokens` of a tile. Asks for the values
    /// in `next` meanwhile.
    fn weigh<V: Wide>(
        weights: &[Scores],
        tokens: usize,
        values: &Panels<'_, Self::Number>,
        next: Option<&Panels<'_, Self::Number>>,
        sums: &mut [[f32; LANES]],
        space: &mut Space,
    );
}

/// Memory for what a format makes of weights.
#[derive(Default)]
pub(super) struct Space {
    weights: Vec<int8::Weights>,
}
