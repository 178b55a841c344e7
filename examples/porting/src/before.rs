//! The decoder as candle's models are written: one sequence, a contiguous cache in each layer.

use candle_core::{D, Device, Result, Tensor};
use candle_nn::kv_cache::KvCache;
use candle_nn::{ops, rotary_emb};

use crate::parts::{CONTEXT, HEAD_DIM, HEADS, KV_HEADS, LAYERS, Layer, Parts, linear, norm};

pub(crate) struct Model {
    parts: Parts,
    caches: Vec<KvCache>,
}

impl Model {
    pub(crate) fn new(parts: Parts) -> Self {
        Self { parts, caches: (0..LAYERS).map(|_| KvCache::new(2, CONTEXT)).collect() }
    }

    pub(crate) fn clear(&mut self) {
        self.caches.iter_mut().for_each(KvCache::reset);
    }

    /// The logits after the last of `tokens`, the first of which has the position `position`.
    pub(crate) fn forward(&mut self, tokens: &[u32], position: usize) -> Result<Tensor> {
        let n = tokens.len();
        let cos = self.parts.cos.narrow(0, position, n)?;
        let sin = self.parts.sin.narrow(0, position, n)?;
        let mut x = self.parts.embedding.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?.unsqueeze(0)?;
        for (layer, cache) in self.parts.layers.iter().zip(&mut self.caches) {
            x = (attention(layer, cache, &norm(&x)?, &cos, &sin)? + x)?;
            x = (layer.feed_forward(&norm(&x)?)? + x)?;
        }
        let last = x.narrow(1, n - 1, 1)?.squeeze(1)?;
        linear(&norm(&last)?, &self.parts.embedding)
    }
}

// shown
/// `x` is `(1, tokens, width)`.
fn attention(layer: &Layer, cache: &mut KvCache, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (_, n, _) = x.dims3()?;
    let heads = |x: Tensor, heads| x.reshape((1, n, heads, HEAD_DIM))?.transpose(1, 2)?.contiguous();
    let q = rotary_emb::rope(&heads(linear(x, &layer.q)?, HEADS)?, cos, sin)?;
    let k = rotary_emb::rope(&heads(linear(x, &layer.k)?, KV_HEADS)?, cos, sin)?;
    let v = heads(linear(x, &layer.v)?, KV_HEADS)?;

    let (k, v) = cache.append(&k, &v)?;
    let (k, v) = (repeat_kv(&k)?, repeat_kv(&v)?);
    let scores = (q.matmul(&k.t()?)? / (HEAD_DIM as f64).sqrt())?;
    let scores = scores.broadcast_add(&mask(n, k.dim(2)?)?)?;
    let y = ops::softmax(&scores, D::Minus1)?.matmul(&v)?;

    linear(&y.transpose(1, 2)?.flatten_from(2)?, &layer.o)
}
// shown

/// Each key head for all query heads of its group.
fn repeat_kv(x: &Tensor) -> Result<Tensor> {
    let (_, _, n, _) = x.dims4()?;
    x.unsqueeze(2)?.expand((1, KV_HEADS, HEADS / KV_HEADS, n, HEAD_DIM))?.reshape((1, HEADS, n, HEAD_DIM))
}

/// The last `n` of `all` tokens see those before them and themselves.
fn mask(n: usize, all: usize) -> Result<Tensor> {
    let sees = |row: usize, at: usize| at <= all - n + row;
    let numbers = (0..n).flat_map(|row| (0..all).map(move |at| if sees(row, at) { 0f32 } else { f32::NEG_INFINITY }));
    Tensor::from_iter(numbers, &Device::Cpu)?.reshape((n, all))
}
