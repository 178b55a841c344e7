//! Two other ways to keep keys and values, and this crate's caches, behind one trait.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use bitnet_kv::{KVCache, PagedKVCache};
use candle_core::{D, Device, Result, Tensor};

use super::model::{Cache, DIM, HEADS, KV_HEADS, LAYERS};

/// Concatenates the new keys and values to the old ones, `[1, KV_HEADS, T, DIM]`.
#[derive(Default)]
pub struct Concatenating([Option<(Tensor, Tensor)>; LAYERS]);

/// Replaces the whole tensors, `[T, KV_HEADS, DIM]`, by ones that the caller has concatenated.
#[derive(Default)]
pub struct Replacing([Option<(Tensor, Tensor)>; LAYERS]);

/// [`KVCache`], with dense attention over what [`KVCache::get`] returns.
pub struct Updated(pub KVCache);

/// [`PagedKVCache`], with its own attention.
pub struct Paged(pub PagedKVCache);

/// Dense attention: keys and values repeated for each query head, scores, mask, softmax, product.
fn dense(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (rows, len) = (q.dim(2)?, k.dim(2)?);
    let group = HEADS / KV_HEADS;
    let repeat = |t: &Tensor| {
        t.unsqueeze(2)?.broadcast_as((1, KV_HEADS, group, len, DIM))?.contiguous()?.reshape((1, HEADS, len, DIM))
    };
    let scores = (q.contiguous()?.matmul(&repeat(k)?.t()?)? / (DIM as f64).sqrt())?;
    let hidden = |row: usize, at: usize| if at > len - rows + row { f32::NEG_INFINITY } else { 0.0 };
    let mask: Vec<f32> = (0..rows).flat_map(|row| (0..len).map(move |at| hidden(row, at))).collect();
    let scores = scores.broadcast_add(&Tensor::from_vec(mask, (rows, len), &Device::Cpu)?)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?.matmul(&repeat(v)?)
}

impl Cache for Concatenating {
    fn len(&self, layer: usize) -> usize {
        self.0[layer].as_ref().map_or(0, |(k, _)| k.dims()[2])
    }

    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (k, v) = match &self.0[layer] {
            Some((before_k, before_v)) => (Tensor::cat(&[before_k, k], 2)?, Tensor::cat(&[before_v, v], 2)?),
            None => (k.contiguous()?, v.contiguous()?),
        };
        self.0[layer] = Some((k.clone(), v.clone()));
        dense(q, &k, &v)
    }
}

/// `[1, H, T, D]` as `[T, H, D]`.
fn by_token(t: &Tensor) -> Result<Tensor> {
    t.squeeze(0)?.transpose(0, 1)?.contiguous()
}

/// `[T, H, D]` as `[1, H, T, D]`.
fn by_head(t: &Tensor) -> Result<Tensor> {
    t.transpose(0, 1)?.contiguous()?.unsqueeze(0)
}

impl Cache for Replacing {
    fn len(&self, layer: usize) -> usize {
        self.0[layer].as_ref().map_or(0, |(k, _)| k.dims()[0])
    }

    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (k, v) = (by_token(k)?, by_token(v)?);
        let whole = match &self.0[layer] {
            Some((before_k, before_v)) => (Tensor::cat(&[before_k, &k], 0)?, Tensor::cat(&[before_v, &v], 0)?),
            None => (k, v),
        };
        self.0[layer] = Some(whole.clone());
        dense(q, &by_head(&whole.0)?, &by_head(&whole.1)?)
    }
}

impl Cache for Updated {
    fn len(&self, layer: usize) -> usize {
        self.0.seq_len(layer)
    }

    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let len = self.len(layer) + k.dim(2)?;
        self.0.update(layer, k.clone(), v.clone(), len)?;
        let (k, v) = self.0.get(layer)?;
        dense(q, &by_head(&k)?, &by_head(&v)?)
    }
}

impl Cache for Paged {
    fn len(&self, layer: usize) -> usize {
        self.0.layers()[layer].seq_len()
    }

    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let layer = &mut self.0.layers_mut()[layer];
        layer.append(k, v)?;
        Ok(layer.attend(q, 1.0 / (DIM as f32).sqrt(), true)?)
    }
}
