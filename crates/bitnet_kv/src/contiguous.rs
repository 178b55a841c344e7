//! A layer's keys and values one behind the other, for those who take them as tensors.
//!
//! Blocks are no tensor of that shape, so the first who asks pays for a copy. It is kept, and grows by the tokens that are new
//! as a `Vec` does: who asks again gets a view. Views stay what they are: rows are only ever added behind them, and when rows
//! change, the copy is dropped and made anew.

use candle_core::Tensor;

use crate::error::Result;
use crate::read::View;

/// Keys and values: of one sequence `(room, kv_heads, head_dim)`, of several `(batch, kv_heads, room, head_dim)`.
#[derive(Debug)]
pub(crate) struct Contiguous {
    k: Tensor,
    v: Tensor,
    tokens: usize,
    /// In which dimension the tokens lie.
    dim: usize,
}

impl Contiguous {
    /// All that `view` has, and room for as much again, but for no more than `most` tokens.
    pub(crate) fn new(view: &View, most: usize) -> Result<Self> {
        let (k, v) = view.shaped(view.keys_and_values_from(0)?)?;
        let tokens = view.len;
        let dim = if view.batch == 1 { 0 } else { 2 };
        let mut own = Self { k, v, tokens, dim };
        own.make_room(tokens.saturating_mul(2).min(most))?;
        Ok(own)
    }

    /// Adds what `view` has more.
    pub(crate) fn extend(&mut self, view: &View, most: usize) -> Result<()> {
        let new = view.len - self.tokens;
        if new == 0 {
            return Ok(());
        }
        let room = self.k.dims()[self.dim];
        if view.len > room {
            self.make_room(view.len.max(room.saturating_mul(2).min(most)))?;
        }
        let (k, v) = view.shaped(view.keys_and_values_from(self.tokens)?)?;
        self.k.slice_set(&k, self.dim, self.tokens)?;
        self.v.slice_set(&v, self.dim, self.tokens)?;
        self.tokens = view.len;
        Ok(())
    }

    /// Views of the keys and values.
    pub(crate) fn views(&self) -> Result<(Tensor, Tensor)> {
        Ok((self.k.narrow(self.dim, 0, self.tokens)?, self.v.narrow(self.dim, 0, self.tokens)?))
    }

    /// What it takes of memory.
    pub(crate) fn bytes(&self) -> usize {
        (self.k.elem_count() + self.v.elem_count()) * self.k.dtype().size_in_bytes()
    }

    fn make_room(&mut self, room: usize) -> Result<()> {
        if room <= self.k.dims()[self.dim] {
            return Ok(());
        }
        for tensor in [&mut self.k, &mut self.v] {
            let mut dims = tensor.dims().to_vec();
            dims[self.dim] = room;
            let larger = Tensor::zeros(dims, tensor.dtype(), tensor.device())?;
            larger.slice_set(&tensor.narrow(self.dim, 0, self.tokens)?.contiguous()?, self.dim, 0)?;
            *tensor = larger;
        }
        Ok(())
    }
}
