//! The storage formats of keys and values, and the products over keys and values in these formats.

/// Compiles a call once for each number of rows in a group, 1 to [`ROWS`], as the constant `$n`.
macro_rules! by_rows {
    ($rows:expr, $n:ident => $call:expr) => {
        match $rows {
            1 => by_rows!(@ $n 1 $call),
            2 => by_rows!(@ $n 2 $call),
            3 => by_rows!(@ $n 3 $call),
            _ => by_rows!(@ $n 4 $call),
        }
    };
    (@ $n:ident $rows:literal $call:expr) => {{
        const $n: usize = $rows;
        $call
    }};
}

mod float;
mod int8;

use block_pool::KvLayout;

pub(super) use float::{Float, Number};
pub(super) use int8::Int8;
pub(crate) use int8::MAX_DIMS as MOST_INT8_DIMS;

use super::panels::{Panels, Scores};
use super::wide::{LANES, Wide};

/// Rows per group: a product computes up to this many rows at a time.
pub(super) const ROWS: usize = 4;

/// A storage format of keys and values.
///
/// Panels are runs of sixteen tokens in the order of a [`KvLayout`], or empty if they have no token to read. Rows are
/// query heads of new tokens, in groups of up to four.
pub(super) trait Format: 'static {
    /// The element type of the tensor.
    type Number: Copy + Default + Send + Sync;
    /// Query rows, packed for the products.
    type Queries: Default + Send + Sync;

    /// Stores one token's key and value in one head of a block. If the values are in the keys, `v` is empty.
    fn store(layout: &KvLayout, block: &mut [Self::Number], offset: usize, head: usize, k: &[f32], v: &[f32]);

    /// Reads one token's key and value in one head of a block.
    fn load(layout: &KvLayout, block: &[Self::Number], offset: usize, head: usize, k: &mut [f32], v: &mut [f32]);

    /// The sizes, in elements, of the keys and of the values of a gathered panel whose values have `dims` dimensions.
    fn panel_sizes(head_dim: usize, dims: usize) -> [usize; 2];

    /// Copies one token's key and value from a block to token `index` of a gathered panel whose values have `dims`
    /// dimensions. If the values are in the keys, only the key.
    fn copy(
        layout: &KvLayout,
        block: &[Self::Number],
        offset: usize,
        head: usize,
        to: (&mut [Self::Number], &mut [Self::Number]),
        index: usize,
        dims: usize,
    );

    /// Removes all query rows.
    fn clear(queries: &mut Self::Queries);

    /// Appends a group of query rows `(rows, head_dim)`, multiplied by `factor`.
    fn prepare(queries: &mut Self::Queries, rows: &[f32], head_dim: usize, factor: f32);

    /// `scores (rows, panels, 16) = q (rows, head_dim) kᵀ` for any number of rows, from the group `first` on. Prefetches
    /// the keys in `next` meanwhile.
    fn scores<V: Wide>(
        queries: &Self::Queries,
        first: usize,
        keys: &Panels<'_, Self::Number>,
        next: Option<&Panels<'_, Self::Number>>,
        scores: &mut [Scores],
    );

    /// `sums (rows, dims) += weights (rows, tokens) v (tokens, dims)` for any number of rows and the first `tokens` of a
    /// tile. Prefetches the values in `next` meanwhile.
    fn accumulate<V: Wide>(
        weights: &[Scores],
        tokens: usize,
        values: &Panels<'_, Self::Number>,
        next: Option<&Panels<'_, Self::Number>>,
        sums: &mut [[f32; LANES]],
        buffers: &mut Buffers,
    );

    /// The same for values that are the first `value_dim` dimensions of the keys: keys lie by dimension, so they are
    /// transposed, once for all rows.
    fn accumulate_keys<V: Wide>(
        weights: &[Scores],
        tokens: usize,
        keys: &Panels<'_, Self::Number>,
        value_dim: usize,
        sums: &mut [[f32; LANES]],
        buffers: &mut Buffers,
    );
}

/// Buffers that formats need for a tile.
#[derive(Default)]
pub(super) struct Buffers {
    /// Quantised weights.
    weights: Vec<int8::Weights>,
    /// A strip of transposed keys.
    strip: Vec<[f32; LANES]>,
    /// Transposed keys.
    bytes: Vec<u8>,
}
