//! The values of a tile whose values are in its keys.
//!
//! A product of weights and values reads a token's value as a run; keys are stored by dimension. So the first dimensions
//! of the keys are transposed into a buffer, once for all rows of a task. Such keys have many query rows: all heads read
//! the same ones.

use std::array::from_fn;

use super::format::Format;
use super::panels::{Panels, TILE_PANELS};
use super::wide::{Run, Wide};

/// A buffer for the values of a tile.
#[derive(Default)]
pub(super) struct Transposed<N> {
    values: Vec<N>,
}

impl<N: Copy + Default> Transposed<N> {
    /// The values, of `value_dim` dimensions, that are in these keys of `head_dim` dimensions. `dims` is `value_dim`
    /// rounded up to whole vectors.
    #[inline(always)]
    pub(super) fn fill<V: Wide, F: Format<Number = N>>(
        &mut self,
        keys: &Panels<'_, N>,
        [head_dim, value_dim, dims]: [usize; 3],
    ) -> Panels<'_, N> {
        let [_, size] = F::panel_sizes(head_dim, dims);
        self.values.resize(TILE_PANELS * size, N::default());
        for (keys, values) in keys.iter().zip(self.values.chunks_exact_mut(size)) {
            if !keys.is_empty() {
                V::outlined(Transpose::<F> { keys, value_dim, dims, values });
            }
        }
        from_fn(|panel| if keys[panel].is_empty() { &[][..] } else { &self.values[panel * size..][..size] })
    }
}

struct Transpose<'a, F: Format> {
    keys: &'a [F::Number],
    value_dim: usize,
    dims: usize,
    values: &'a mut [F::Number],
}

impl<F: Format> Run for Transpose<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Wide>(self) {
        F::transpose(self.keys, self.value_dim, self.dims, self.values);
    }
}
