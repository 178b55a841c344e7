//! Where each number of a block lies: only this file computes it.
//!
//! Gather, write, copy and kernels use it. `docs/layout.md` has the pictures.

use std::ops::Range;

use crate::{KvDtype, KvShape};

/// The order of the numbers inside one block of one layer.
///
/// In the orders for CPUs the tokens of a block are cut into *panels* of up to [`PANEL`] neighbours. Panels and heads
/// are nested as `(panels, kv_heads)`, and each head has first its keys, then its values. A kernel that goes from panel
/// to panel and from head to head reads memory from its beginning to its end, so that the processor prefetches it by
/// itself. A block of several panels has the same numbers in the same order as that many blocks of one panel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    /// K, then V, `(block_size, kv_heads, head_dim)` each, as FlashInfer's and vLLM's kernels read them: the numbers of
    /// a token are contiguous, so that plain tensor operations can write and gather them. If values have a dimension of
    /// their own, a block is `(block_size, kv_heads, head_dim + value_dim)`, each key with its value after it; if they
    /// are in the keys, it is `(block_size, kv_heads, head_dim)`. It has been used on CPUs only, never on a GPU (CUDA,
    /// Metal).
    Nhd,
    /// K `(head_dim, panel)` and V `(strips, panel, strip)` for each panel and head. K is transposed, so that a CPU
    /// computes the scores of neighbouring tokens in one register without a horizontal sum. V is cut into strips of up
    /// to [`STRIP`] dimensions, which is how many a CPU accumulates at a time.
    Panels,
    /// Bytes: K `(head_dim / 4, panel, 4)` and V `(strips, panel / 4, strip, 4)`, each followed by the scales of its
    /// tokens in f32. Four numbers that a dot product adds up are adjacent, as the integer dot products of CPUs expect.
    /// A strip has up to [`BYTE_STRIP`] dimensions. If `head_dim` is not a multiple of four, the last group of four in
    /// K is padded. If the panel's tokens are not a multiple of four, the last group in V has fewer than four tokens
    /// and no padding.
    QuadPanels,
}

impl Order {
    /// The order in which CPU kernels read numbers of this type.
    pub fn of_panels(dtype: KvDtype) -> Self {
        if dtype == KvDtype::Int8 { Self::QuadPanels } else { Self::Panels }
    }
}

/// The most tokens in a panel. Sixteen f32 are one register of AVX-512, two of AVX2 or four of NEON.
pub const PANEL: usize = 16;

/// The most dimensions in a strip of values: four registers of AVX-512, eight of AVX2 or sixteen of NEON.
pub const STRIP: usize = 64;

/// The most dimensions in a strip of 8-bit values: with four tokens each, one register of AVX-512, two of AVX2 or four
/// of NEON.
pub const BYTE_STRIP: usize = 16;

/// Bytes of a scale in [`Order::QuadPanels`]: an f32.
const SCALE: usize = 4;

/// Numbers in a group in [`Order::QuadPanels`]: dimensions of a key, tokens of a value.
pub const QUAD: usize = 4;

/// The layout of one block in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Tokens per block.
    pub block_size: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Dimensions of a key.
    pub head_dim: usize,
    /// Dimensions of a value.
    pub value_dim: usize,
    /// Whether the values are the first dimensions of the keys. They are not stored a second time then.
    pub values_in_keys: bool,
    /// The order of the numbers.
    pub order: Order,
}

impl KvLayout {
    /// The layout of blocks of `block_size` tokens in each layer of this shape.
    pub fn new(shape: &KvShape, block_size: usize, order: Order) -> Self {
        let KvShape { kv_heads, head_dim, value_dim, values_in_keys, .. } = *shape;
        Self { block_size, kv_heads, head_dim, value_dim, values_in_keys, order }
    }

    /// Elements in one block of one layer, K and V together: numbers, or bytes in [`Order::QuadPanels`].
    #[inline]
    pub fn block_elements(&self) -> usize {
        self.kv_heads * self.block_size * (self.key_elements() + self.value_elements())
    }

    /// Elements of one token's key in one head.
    #[inline]
    fn key_elements(&self) -> usize {
        match self.order {
            Order::Nhd | Order::Panels => self.head_dim,
            Order::QuadPanels => self.head_dim.next_multiple_of(QUAD) + SCALE,
        }
    }

    /// Elements of one token's value in one head, apart from its key.
    #[inline]
    fn value_elements(&self) -> usize {
        match self.order {
            _ if self.values_in_keys => 0,
            Order::Nhd | Order::Panels => self.value_dim,
            Order::QuadPanels => self.value_dim + SCALE,
        }
    }

    /// Tokens in the panel with this index: [`PANEL`], except that the last panel of a block can have fewer.
    #[inline]
    fn width(&self, panel: usize) -> usize {
        PANEL.min(self.block_size - panel * PANEL)
    }

    /// The range of the keys of `head` in a panel, contiguous: with [`Panels`](Order::Panels) `(head_dim, panel)`.
    #[inline]
    pub fn key_panel(&self, head: usize, panel: usize) -> Range<usize> {
        debug_assert_ne!(self.order, Order::Nhd);
        let per_token = self.key_elements() + self.value_elements();
        let start = (panel * PANEL * self.kv_heads + head * self.width(panel)) * per_token;
        start..start + self.width(panel) * self.key_elements()
    }

    /// The range of the values of `head` in a panel, contiguous and directly after its keys: with
    /// [`Panels`](Order::Panels) `(strips, panel, strip)`. Empty if the values are in the keys.
    #[inline]
    pub fn value_panel(&self, head: usize, panel: usize) -> Range<usize> {
        let start = self.key_panel(head, panel).end;
        start..start + self.width(panel) * self.value_elements()
    }

    /// The index of dimension `dim` of `head`'s key for the token at `offset`, counted from the block's start.
    #[inline]
    pub fn key(&self, offset: usize, head: usize, dim: usize) -> usize {
        let (panel, at) = (offset / PANEL, offset % PANEL);
        match self.order {
            Order::Nhd => (offset * self.kv_heads + head) * self.token_elements() + dim,
            Order::Panels => self.key_panel(head, panel).start + dim * self.width(panel) + at,
            Order::QuadPanels => {
                self.key_panel(head, panel).start + (dim / QUAD * self.width(panel) + at) * QUAD + dim % QUAD
            }
        }
    }

    /// The index of dimension `dim` of `head`'s value for the token at `offset`, counted from the block's start.
    #[inline(always)]
    pub fn value(&self, offset: usize, head: usize, dim: usize) -> usize {
        let (panel, at) = (offset / PANEL, offset % PANEL);
        // The first dimension of the strip, and how many dimensions the strip has.
        let strip = |most: usize| (dim / most * most, most.min(self.value_dim - dim / most * most));
        match self.order {
            _ if self.values_in_keys => self.other_value(offset, head, dim),
            Order::Nhd => self.other_value(offset, head, dim),
            Order::Panels => {
                let (first, dims) = strip(STRIP);
                self.value_panel(head, panel).start + first * self.width(panel) + at * dims + dim - first
            }
            Order::QuadPanels => {
                let (first, dims) = strip(BYTE_STRIP);
                let strip = self.value_panel(head, panel).start + first * self.width(panel);
                strip + at / QUAD * QUAD * dims + (dim - first) * self.value_step(offset) + at % QUAD
            }
        }
    }

    /// [`value`](Self::value) where it is the key's, or in [`Order::Nhd`]. Apart, so that the kernels' cases stay small
    /// enough to be compiled into their loops.
    #[inline(never)]
    fn other_value(&self, offset: usize, head: usize, dim: usize) -> usize {
        if self.values_in_keys {
            self.key(offset, head, dim)
        } else if self.planes() == 2 {
            self.key(offset + self.block_size, head, dim)
        } else {
            self.key(offset, head, self.head_dim + dim)
        }
    }

    /// In [`Order::QuadPanels`]: how far apart the dimensions of a value are inside a strip. (Those of a key are
    /// neighbours inside a group of four.)
    #[inline]
    pub fn value_step(&self, offset: usize) -> usize {
        let (panel, at) = (offset / PANEL, offset % PANEL);
        QUAD.min(self.width(panel) - at / QUAD * QUAD)
    }

    /// In [`Order::QuadPanels`]: the range of the scale of `head`'s key for the token at `offset`.
    #[inline]
    pub fn key_scale(&self, offset: usize, head: usize) -> Range<usize> {
        self.scale(self.key_panel(head, offset / PANEL), offset)
    }

    /// In [`Order::QuadPanels`]: the range of the scale of `head`'s value for the token at `offset`.
    #[inline]
    pub fn value_scale(&self, offset: usize, head: usize) -> Range<usize> {
        if self.values_in_keys {
            return self.key_scale(offset, head);
        }
        self.scale(self.value_panel(head, offset / PANEL), offset)
    }

    #[inline]
    fn scale(&self, panel: Range<usize>, offset: usize) -> Range<usize> {
        debug_assert_eq!(self.order, Order::QuadPanels);
        let start = panel.end - (self.width(offset / PANEL) - offset % PANEL) * SCALE;
        start..start + SCALE
    }

    /// In [`Order::Nhd`]: the numbers of a token in one head that lie together.
    #[inline(never)]
    fn token_elements(&self) -> usize {
        if self.planes() == 2 { self.head_dim } else { self.head_dim + self.value_elements() }
    }

    /// In [`Order::Nhd`]: 2 if a block has first the keys of all its tokens and then the values of all, 1 if each token
    /// has its key and value together.
    #[inline]
    pub fn planes(&self) -> usize {
        debug_assert_eq!(self.order, Order::Nhd);
        if !self.values_in_keys && self.value_dim == self.head_dim { 2 } else { 1 }
    }

    /// In an [`Nhd`](Order::Nhd) layer seen as rows of one token each: the row of the token's key. With two
    /// [`planes`](Self::planes), the row of its value is `block_size` rows further on.
    #[inline]
    pub fn token_row(&self, block: usize, offset: usize) -> usize {
        block * self.planes() * self.block_size + offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Block sizes: less than a panel, one panel, more than one, and several.
    const SIZES: [usize; 6] = [1, 5, 7, 16, 27, 48];

    #[test]
    fn every_number_of_a_block_has_an_index_of_its_own() {
        let shapes = [8, 7, 72].map(|head_dim| KvShape::new(1, 3, head_dim));
        let shapes = shapes.into_iter().flat_map(|shape| [shape, shape.value_dim(5), shape.value_dim(72)]);
        for (shape, order) in
            shapes.flat_map(|shape| [Order::Nhd, Order::Panels, Order::QuadPanels].map(|o| (shape, o)))
        {
            for block_size in SIZES {
                let layout = KvLayout::new(&shape, block_size, order);
                let mut seen = vec![false; layout.block_elements()];
                let mut indices = Vec::new();
                for (offset, head) in (0..block_size).flat_map(|offset| (0..3).map(move |head| (offset, head))) {
                    indices.extend((0..shape.head_dim).map(|dim| layout.key(offset, head, dim)));
                    indices.extend((0..shape.value_dim).map(|dim| layout.value(offset, head, dim)));
                    if order == Order::QuadPanels {
                        indices.extend(layout.key_scale(offset, head));
                        indices.extend(layout.value_scale(offset, head));
                    }
                }
                for at in indices {
                    assert!(!std::mem::replace(&mut seen[at], true), "{layout:?} uses {at} twice");
                }
                let unused = seen.into_iter().filter(|used| !used).count();
                let padding = shape.head_dim.next_multiple_of(4) - shape.head_dim;
                let filled_up = if order == Order::QuadPanels { 3 * block_size * padding } else { 0 };
                assert_eq!(unused, filled_up, "{layout:?}");
            }
        }
    }

    #[test]
    fn values_in_keys_take_no_room_of_their_own() {
        for order in [Order::Nhd, Order::Panels, Order::QuadPanels] {
            for block_size in SIZES {
                let of = |shape: KvShape| KvLayout::new(&shape, block_size, order);
                let latent = of(KvShape::new(1, 1, 72).values_in_keys(64));
                // What is stored beside the keys when the values have a single dimension: that, and in bytes its scale.
                let beside = if order == Order::QuadPanels { 5 } else { 1 };
                let single = of(KvShape::new(1, 1, 72).value_dim(1));
                assert_eq!(latent.block_elements() + beside * block_size, single.block_elements());
                for offset in 0..block_size {
                    assert!((0..64).all(|dim| latent.value(offset, 0, dim) == latent.key(offset, 0, dim)));
                }
            }
        }
    }

    #[test]
    fn the_panel_of_a_head_is_contiguous_and_a_token_is_one_row() {
        for order in [Order::Panels, Order::QuadPanels] {
            for block_size in SIZES {
                let layout = KvLayout::new(&KvShape::new(1, 2, 3), block_size, order);
                for offset in 0..block_size {
                    for head in 0..2 {
                        let (keys, values) =
                            (layout.key_panel(head, offset / PANEL), layout.value_panel(head, offset / PANEL));
                        for dim in 0..3 {
                            assert!(keys.contains(&layout.key(offset, head, dim)));
                            assert!(values.contains(&layout.value(offset, head, dim)));
                        }
                    }
                }
            }
        }
        let one = |block_size| KvLayout::new(&KvShape::new(1, 2, 70), block_size, Order::Panels);
        assert_eq!(one(48).key(35, 1, 3), 2 * one(16).block_elements() + one(16).key(3, 1, 3));
        assert_eq!(one(48).value(35, 1, 69), 2 * one(16).block_elements() + one(16).value(3, 1, 69));
        let by_token = KvLayout::new(&KvShape::new(1, 2, 3), 4, Order::Nhd);
        let row = by_token.kv_heads * by_token.head_dim;
        assert_eq!(by_token.token_row(0, 3) * row, by_token.key(3, 0, 0));
        assert_eq!((by_token.token_row(0, 3) + by_token.block_size) * row, by_token.value(3, 0, 0));
    }
}
