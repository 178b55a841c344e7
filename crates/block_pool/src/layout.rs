//! Where each number of a block lies: the only place that knows.
//!
//! Gather, write, copy and kernels ask here. `docs/layout.md` has the pictures.

use std::ops::Range;

#[cfg(feature = "candle")]
use crate::PoolError;

/// The keys and values that one token leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvShape {
    /// Attention layers.
    pub layers: usize,
    /// Key and value heads per layer. Fewer than query heads in grouped-query attention.
    pub kv_heads: usize,
    /// Dimensions per head.
    pub head_dim: usize,
}

impl KvShape {
    /// Bytes that a block takes over all layers when each number takes `bytes_per_number`; `None` if they are too many
    /// to count.
    pub fn bytes_per_block(&self, block_size: usize, bytes_per_number: usize) -> Option<usize> {
        [2, self.layers, self.kv_heads, self.head_dim, block_size]
            .into_iter()
            .try_fold(bytes_per_number, usize::checked_mul)
    }

    #[cfg(feature = "candle")]
    pub(crate) fn check(&self) -> Result<(), PoolError> {
        let Self { layers, kv_heads, head_dim } = *self;
        if layers == 0 || kv_heads == 0 || head_dim == 0 {
            return Err(PoolError::EmptyShape { layers, kv_heads, head_dim });
        }
        Ok(())
    }
}

/// The order of the numbers inside one block of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    /// K and V `(block_size, kv_heads, head_dim)`: a token's numbers are one run, so that plain tensor operations
    /// can write and gather them. What GPU kernels expect.
    TokenMajor,
    /// K `(kv_heads, head_dim, block_size)` and V `(kv_heads, block_size, head_dim)`: each head one run, and K
    /// transposed, so that a CPU computes the scores of neighbouring tokens in one register without adding across it.
    HeadMajor,
}

/// The layout of one block in one layer: first K, then V, each `block_size * kv_heads * head_dim` numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Tokens per block.
    pub block_size: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Dimensions per head.
    pub head_dim: usize,
    /// How the three are nested.
    pub order: Order,
}

impl KvLayout {
    /// Numbers in one block of one layer, K and V together.
    #[inline]
    pub fn block_elements(&self) -> usize {
        2 * self.half()
    }

    /// Numbers in K, or in V, of one block of one layer.
    #[inline]
    fn half(&self) -> usize {
        self.block_size * self.kv_heads * self.head_dim
    }

    /// Numbers of one head in K, or in V, of one block.
    #[inline]
    pub fn head_elements(&self) -> usize {
        self.block_size * self.head_dim
    }

    /// Where dimension `dim` of `head`'s key for the token at `offset` lies, counted from the block's start.
    #[inline]
    pub fn key(&self, offset: usize, head: usize, dim: usize) -> usize {
        match self.order {
            Order::TokenMajor => (offset * self.kv_heads + head) * self.head_dim + dim,
            Order::HeadMajor => (head * self.head_dim + dim) * self.block_size + offset,
        }
    }

    /// Where dimension `dim` of `head`'s value for the token at `offset` lies, counted from the block's start.
    #[inline]
    pub fn value(&self, offset: usize, head: usize, dim: usize) -> usize {
        self.half()
            + match self.order {
                Order::TokenMajor => (offset * self.kv_heads + head) * self.head_dim + dim,
                Order::HeadMajor => (head * self.block_size + offset) * self.head_dim + dim,
            }
    }

    /// How far apart two neighbouring dimensions of one key lie.
    #[inline]
    pub fn key_stride(&self) -> usize {
        match self.order {
            Order::TokenMajor => 1,
            Order::HeadMajor => self.block_size,
        }
    }

    /// The keys of `head` in a [`HeadMajor`](Order::HeadMajor) block: `(head_dim, block_size)`.
    #[inline]
    pub fn head_keys(&self, head: usize) -> Range<usize> {
        debug_assert_eq!(self.order, Order::HeadMajor);
        let start = self.key(0, head, 0);
        start..start + self.head_elements()
    }

    /// The values of `head` in a [`HeadMajor`](Order::HeadMajor) block: `(block_size, head_dim)`.
    #[inline]
    pub fn head_values(&self, head: usize) -> Range<usize> {
        debug_assert_eq!(self.order, Order::HeadMajor);
        let start = self.value(0, head, 0);
        start..start + self.head_elements()
    }

    /// In a [`TokenMajor`](Order::TokenMajor) layer seen as rows of `kv_heads * head_dim` numbers: the row of the
    /// token's key. Its value is `block_size` rows further on.
    #[inline]
    pub fn token_row(&self, block: usize, offset: usize) -> usize {
        debug_assert_eq!(self.order, Order::TokenMajor);
        block * 2 * self.block_size + offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_a_block_has_one_place() {
        for order in [Order::TokenMajor, Order::HeadMajor] {
            let layout = KvLayout { block_size: 5, kv_heads: 3, head_dim: 7, order };
            let mut seen = vec![false; layout.block_elements()];
            for offset in 0..5 {
                for head in 0..3 {
                    for dim in 0..7 {
                        for at in [layout.key(offset, head, dim), layout.value(offset, head, dim)] {
                            assert!(!std::mem::replace(&mut seen[at], true), "{order:?} uses {at} twice");
                        }
                        assert_eq!(
                            layout.key(offset, head, dim),
                            layout.key(offset, head, 0) + dim * layout.key_stride()
                        );
                    }
                }
            }
            assert!(seen.into_iter().all(|used| used));
        }
    }

    #[test]
    fn a_head_is_one_run_and_a_token_one_row() {
        let by_head = KvLayout { block_size: 4, kv_heads: 2, head_dim: 3, order: Order::HeadMajor };
        assert!(by_head.head_keys(1).contains(&by_head.key(3, 1, 2)));
        assert!(by_head.head_values(1).contains(&by_head.value(0, 1, 0)));
        assert!(!by_head.head_values(1).contains(&by_head.value(3, 0, 2)));

        let by_token = KvLayout { order: Order::TokenMajor, ..by_head };
        let row = by_token.kv_heads * by_token.head_dim;
        assert_eq!(by_token.token_row(0, 3) * row, by_token.key(3, 0, 0));
        assert_eq!((by_token.token_row(0, 3) + by_token.block_size) * row, by_token.value(3, 0, 0));
    }
}
