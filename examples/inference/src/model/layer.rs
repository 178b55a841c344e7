//! A layer: its attention, its feed-forward, and what is around them.

use anyhow::Result;
use candle_core::{D, Module, Tensor};
use candle_nn::rotary_emb;

use super::feed_forward::FeedForward;
use super::norm::RmsNorm;
use crate::architecture::Pairs;
use crate::config::Config;
use crate::gguf::Gguf;
use crate::weights::{Joined, Linear, Weights};

#[derive(Debug)]
pub(super) struct Layer {
    attention_norm: RmsNorm,
    qkv: Joined,
    /// Of each head of q, and of k.
    head_norms: Option<[RmsNorm; 2]>,
    o: Linear,
    post_attention_norm: Option<RmsNorm>,
    mlp_norm: RmsNorm,
    mlp: FeedForward,
    post_mlp_norm: Option<RmsNorm>,
}

impl Layer {
    pub(super) fn load(gguf: &mut Gguf, i: usize, weights: Weights) -> Result<Self> {
        let config = gguf.config().clone();
        let architecture = config.architecture;
        let part = |part: &str| format!("blk.{i}.{part}");
        let norm = |gguf: &mut Gguf, name: &str| RmsNorm::load(gguf, &format!("{}.weight", part(name)));
        let qkv = if architecture.fused {
            let heights = [config.heads, config.kv_heads, config.kv_heads].map(|heads| heads * config.head_dim);
            Joined::cut(gguf.part(&part("attn_qkv"))?, &heights, weights)?
        } else {
            let parts = ["attn_q", "attn_k", "attn_v"].map(part);
            Joined::new(parts.iter().map(|name| gguf.part(name)).collect::<Result<_>>()?, weights)?
        };
        let (o, o_bias) = gguf.part(&part("attn_output"))?;
        let post = architecture.post_norms;
        Ok(Self {
            attention_norm: norm(gguf, "attn_norm")?,
            qkv,
            head_norms: match architecture.key_norms {
                true => Some([norm(gguf, "attn_q_norm")?, norm(gguf, "attn_k_norm")?]),
                false => None,
            },
            o: Linear::new(o, o_bias, weights)?,
            post_attention_norm: post.then(|| norm(gguf, "post_attention_norm")).transpose()?,
            mlp_norm: norm(gguf, "ffn_norm")?,
            mlp: FeedForward::load(gguf, i, weights)?,
            post_mlp_norm: post.then(|| norm(gguf, "post_ffw_norm")).transpose()?,
        })
    }

    /// `x` is `(tokens, width)`, and so is the result. `attend` gets q, k and v, each `(tokens, heads, head_dim)`.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        config: &Config,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let Config { heads, kv_heads, head_dim, .. } = *config;
        let rows = x.dim(0)?;
        let qkv = self.qkv.forward(&self.attention_norm.forward(x)?)?;
        let mut q = qkv[0].reshape((rows, heads, head_dim))?;
        let mut k = qkv[1].reshape((rows, kv_heads, head_dim))?;
        let v = qkv[2].reshape((rows, kv_heads, head_dim))?;
        if let Some([of_q, of_k]) = &self.head_norms {
            (q, k) = (of_q.forward(&q)?, of_k.forward(&k)?);
        }
        let attended = attend(&rotation.apply(&q)?, &rotation.apply(&k)?, &v)?; // (tokens, heads, head_dim)
        let y = self.o.forward(&attended.flatten_from(1)?)?;
        let x = (normed(self.post_attention_norm.as_ref(), y)? + x)?;

        let y = self.mlp.forward(&self.mlp_norm.forward(&x)?)?;
        normed(self.post_mlp_norm.as_ref(), y)? + x
    }
}

fn normed(norm: Option<&RmsNorm>, y: Tensor) -> candle_core::Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(&y),
        None => Ok(y),
    }
}

/// The rotary embedding of the rows of a step.
#[derive(Debug)]
pub(super) struct Rotation {
    /// `(tokens, 1, dims / 2)`
    cos: Tensor,
    sin: Tensor,
    /// How many dimensions of a head are rotated.
    dims: usize,
    pairs: Pairs,
}

impl Rotation {
    /// The rotation at these positions, from tables of cosines and sines.
    pub(super) fn at(tables: &(Tensor, Tensor), positions: &Tensor, config: &Config) -> candle_core::Result<Self> {
        let dims = config.rope.dims;
        let at = |table: &Tensor| table.index_select(positions, 0)?.reshape((positions.elem_count(), 1, dims / 2));
        Ok(Self { cos: at(&tables.0)?, sin: at(&tables.1)?, dims, pairs: config.architecture.pairs })
    }

    /// Rotates `x`, `(tokens, heads, head_dim)`.
    fn apply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (rows, heads, head_dim) = x.dims3()?;
        let rotated = match self.dims == head_dim {
            true => x.clone(),
            false => x.narrow(D::Minus1, 0, self.dims)?.contiguous()?,
        };
        // Each row is an entry of the batch with one token, so that each row has its own position.
        let rotated = rotated.reshape((rows, heads, 1, self.dims))?;
        let rotated = match self.pairs {
            Pairs::Adjacent => rotary_emb::rope_i(&rotated, &self.cos, &self.sin)?,
            Pairs::Halves => rotary_emb::rope(&rotated, &self.cos, &self.sin)?,
        };
        let rotated = rotated.reshape((rows, heads, self.dims))?;
        match head_dim - self.dims {
            0 => Ok(rotated),
            rest => Tensor::cat(&[&rotated, &x.narrow(D::Minus1, self.dims, rest)?], D::Minus1),
        }
    }
}
