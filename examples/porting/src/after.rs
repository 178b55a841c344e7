//! The same decoder on the paged cache: the rows of all sequences of a step in one tensor.

use candle_core::{Result, Tensor};
use candle_nn::rotary_emb;
use paged_attention::{Attention, KvShape, Step};

use crate::parts::{HEAD_DIM, HEADS, KV_HEADS, LAYERS, Layer, Parts, linear, norm};

pub(crate) struct Model {
    parts: Parts,
}

impl Model {
    pub(crate) fn new(parts: Parts) -> Result<Self> {
        Ok(Self { parts })
    }

    /// What the cache stores.
    pub(crate) fn shape(&self) -> KvShape {
        KvShape::new(LAYERS, KV_HEADS, HEAD_DIM)
    }

    /// The logits of the rows whose logits the step wants: by default the last one of each sequence.
    pub(crate) fn forward(&self, step: &Step<'_>) -> Result<Tensor> {
        let positions = step.positions()?;
        let cos = self.parts.cos.index_select(&positions, 0)?; // (tokens, head_dim / 2)
        let sin = self.parts.sin.index_select(&positions, 0)?;
        let mut x = self.parts.embedding.index_select(&step.token_ids()?, 0)?; // (tokens, width)
        for (i, layer) in self.parts.layers.iter().enumerate() {
            x = (attention(layer, i, step, &norm(&x)?, &cos, &sin)? + x)?;
            x = (layer.feed_forward(&norm(&x)?)? + x)?;
        }
        let wanted = x.index_select(&step.logits_rows()?, 0)?;
        linear(&norm(&wanted)?, &self.parts.embedding)
    }
}

// shown
/// `x` is `(tokens, width)`.
fn attention(layer: &Layer, i: usize, step: &Step<'_>, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let n = x.dim(0)?;
    let heads = |x: Tensor, heads| x.reshape((1, n, heads, HEAD_DIM));
    let q = rotary_emb::rope_thd(&heads(linear(x, &layer.q)?, HEADS)?, cos, sin)?.squeeze(0)?;
    let k = rotary_emb::rope_thd(&heads(linear(x, &layer.k)?, KV_HEADS)?, cos, sin)?.squeeze(0)?;
    let v = heads(linear(x, &layer.v)?, KV_HEADS)?.squeeze(0)?;

    let y = step.attend(i, &q, &k, &v, &Attention::scaled_by(HEAD_DIM))?; // (tokens, heads, head_dim)

    linear(&y.flatten_from(1)?, &layer.o)
}
// shown
