//! The shape of keys and values.

#[cfg(feature = "candle")]
use crate::PoolError;
use crate::{KvDtype, KvLayout, Order};

/// The shape of the keys and values of one token.
///
/// ```
/// use block_pool::{KvDtype, KvShape};
///
/// let llama = KvShape::new(32, 8, 128); // values have as many dimensions as keys
/// let mimo = KvShape::new(9, 4, 192).value_dim(128); // they have fewer
/// // DeepSeek-V2-Lite keeps one latent vector for all heads. Its first 512 dimensions are the values.
/// let latent = KvShape::new(27, 1, 576).values_in_keys(512);
/// assert_eq!(llama.bytes_per_block(1, KvDtype::Bf16), Some(32 * 8 * (128 + 128) * 2));
/// assert_eq!(mimo.bytes_per_block(1, KvDtype::Bf16), Some(9 * 4 * (192 + 128) * 2));
/// assert_eq!(latent.bytes_per_block(1, KvDtype::Bf16), Some(31_104));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct KvShape {
    /// Attention layers.
    pub layers: usize,
    /// Key and value heads per layer. Fewer than query heads in grouped-query attention.
    pub kv_heads: usize,
    /// Dimensions of a key, and of a query.
    pub head_dim: usize,
    /// Dimensions of a value, and of a result of attention.
    pub value_dim: usize,
    /// Whether the values are the first [`value_dim`](Self::value_dim) dimensions of the keys.
    pub values_in_keys: bool,
}

impl KvShape {
    /// The shape `(layers, kv_heads, head_dim)`. Values have as many dimensions as keys.
    pub const fn new(layers: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self { layers, kv_heads, head_dim, value_dim: head_dim, values_in_keys: false }
    }

    /// Gives the values `n` dimensions.
    #[must_use]
    pub const fn value_dim(self, n: usize) -> Self {
        Self { value_dim: n, values_in_keys: false, ..self }
    }

    /// Makes the first `n` dimensions of a key also its value, so that only keys are stored: the latent cache of
    /// multi-head latent attention (DeepSeek-V2, section 2.1), whose keys are the latent vector and, after it, the part
    /// with the rotary embedding.
    #[must_use]
    pub const fn values_in_keys(self, n: usize) -> Self {
        Self { value_dim: n, values_in_keys: true, ..self }
    }

    /// Bytes that a block takes over all layers when its numbers are stored as `dtype`; `None` if that overflows.
    pub fn bytes_per_block(&self, block_size: usize, dtype: KvDtype) -> Option<usize> {
        let Self { layers, kv_heads, head_dim, value_dim, .. } = *self;
        // An upper bound: no type takes more than eight bytes for a number, scales and padding included.
        let dims = head_dim.checked_add(value_dim)?;
        [layers, kv_heads, dims, block_size].into_iter().try_fold(8usize, usize::checked_mul)?;
        let layout = KvLayout::new(self, block_size, Order::of_panels(dtype));
        Some(layers * layout.block_elements() * dtype.size_in_bytes())
    }

    #[cfg(feature = "candle")]
    pub(crate) fn check(&self) -> Result<(), PoolError> {
        let Self { layers, kv_heads, head_dim, value_dim, values_in_keys } = *self;
        if layers == 0 || kv_heads == 0 || head_dim == 0 || value_dim == 0 {
            return Err(PoolError::EmptyShape { layers, kv_heads, head_dim, value_dim });
        }
        if values_in_keys && value_dim > head_dim {
            return Err(PoolError::ValuesBeyondKeys { head_dim, value_dim });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_block_are_counted_or_overflow() {
        let shape = KvShape::new(2, 8, 128);
        let bytes = |dtype| shape.bytes_per_block(16, dtype);
        assert_eq!(bytes(KvDtype::F32), Some(2 * 2 * 16 * 8 * 128 * 4));
        assert_eq!(bytes(KvDtype::Bf16), bytes(KvDtype::F32).map(|bytes| bytes / 2));
        // A quarter of the bytes, and two scales for each token and head.
        assert_eq!(bytes(KvDtype::Int8), bytes(KvDtype::F32).map(|bytes| bytes / 4 + 2 * 2 * 16 * 8 * 4));
        assert_eq!(KvShape { layers: usize::MAX / 64, ..shape }.bytes_per_block(16, KvDtype::Int8), None);
        assert_eq!(shape.value_dim(usize::MAX).bytes_per_block(16, KvDtype::Int8), None);
    }
}
