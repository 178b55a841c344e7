//! A contiguous copy of a layer's keys and values, for callers that need them as tensors.
//!
//! Blocks cannot be viewed as a tensor of that shape, so the first call copies them. The copy is kept and grows like a
//! `Vec`: a later call adds only the new tokens and returns a view. Views never change, since rows are only added after
//! them. When existing rows change, the copy is dropped and made again.

use candle_core::Tensor;

use crate::error::Result;
use crate::read::View;

/// Keys and values: `(room, kv_heads, head_dim)` for one sequence, `(batch, kv_heads, room, head_dim)` for several.
#[derive(Debug)]
pub(crate) struct Contiguous {
    k: Tensor,
    v: Tensor,
    tokens: usize,
    /// The dimension of the tokens.
    dim: usize,
}

impl Contiguous {
    /// Copies all tokens of `view`, with room for twice as many, but for at most `most` tokens.
    pub(crate) fn new(view: &View, most: usize) -> Result<Self> {
        let (k, v) = view.shaped(view.keys_and_values_from(0)?)?;
        let tokens = view.len;
        let dim = if view.batch == 1 { 0 } else { 2 };
        let mut copy = Self { k, v, tokens, dim };
        copy.make_room(tokens.saturating_mul(2).min(most))?;
        Ok(copy)
    }

    /// Adds the tokens of `view` that the copy does not have yet.
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

    /// How many bytes of memory the copy takes.
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
