//! A plain decoder for the three models. It leaves the attention to the caller, so that the paged cache and the dense
//! reference can use it.

use candle_core::{D, DType, Device, Result, Tensor};
use paged_attention::{Attention, LayerGroup, Step, Window};

use crate::weights::Weights;

pub(crate) const VOCABULARY: usize = 96;
pub(crate) const EPSILON: f64 = 1e-6;

/// What the models have in common and in what they differ.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) hidden: usize,
    pub(crate) feed: usize,
    pub(crate) heads: usize,
    pub(crate) layers: Vec<Layer>,
    /// Queries and keys are normed, with learned weights (Gemma 3 and 4).
    pub(crate) norms_keys: bool,
    /// Values are normed, without weights (Gemma 4).
    pub(crate) norms_values: bool,
    pub(crate) attention_cap: Option<f64>,
    pub(crate) final_cap: Option<f64>,
}

/// What differs between the layers of a model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layer {
    pub(crate) window: Option<usize>,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) rope_base: f64,
    /// How many pairs of dimensions are rotated: all of them, or the first ones.
    pub(crate) rotated_pairs: usize,
}

impl Shape {
    /// One group for each kind of layer, in the order in which the kinds come first.
    pub(crate) fn groups(&self) -> Vec<LayerGroup> {
        let mut kinds: Vec<&Layer> = Vec::new();
        for layer in &self.layers {
            if !kinds.contains(&layer) {
                kinds.push(layer);
            }
        }
        let group = |kind: &&Layer| {
            let layers = (0..self.layers.len()).filter(|&layer| self.layers[layer] == **kind);
            let group = LayerGroup::new(layers, kind.kv_heads, kind.head_dim);
            match kind.window {
                Some(tokens) => group.window(Window::new(tokens)),
                None => group,
            }
        };
        kinds.iter().map(group).collect()
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Decoder {
    pub(crate) shape: Shape,
    pub(crate) weights: Weights,
}

impl Decoder {
    /// The logits of all rows of a step, `(tokens, vocabulary)`.
    pub(crate) fn forward_step(&self, step: &Step<'_>) -> Result<Tensor> {
        self.forward(&step.token_ids()?, &step.positions()?, |layer, q, k, v| {
            let attention = Attention::scaled_by(self.shape.layers[layer].head_dim);
            let attention = match self.shape.attention_cap {
                Some(cap) => attention.soft_cap(cap as f32),
                None => attention,
            };
            step.attend(layer, q, k, v, &attention)
        })
    }

    /// The logits of these tokens at these positions, `(tokens, vocabulary)`. `attend` gets a layer, and `q`, `k` and
    /// `v` of the shape `(tokens, heads, head_dim)`.
    pub(crate) fn forward(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        mut attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let positions = positions.to_dtype(DType::F32)?.unsqueeze(1)?;
        let embeddings = self.weights.get("embed_tokens");
        let mut x = (embeddings.index_select(ids, 0)? * (self.shape.hidden as f64).sqrt())?;
        for (index, layer) in self.shape.layers.iter().enumerate() {
            let weight = |name: &str| self.weights.get(&format!("layers.{index}.{name}"));
            let product = |x: &Tensor, name: &str| x.matmul(&weight(name).t()?);

            let y = norm(&x, Some(weight("input_layernorm")))?;
            let (heads, kv_heads) = (self.shape.heads, layer.kv_heads);
            let all = product(&y, "self_attn.qkv")?.reshape((y.dim(0)?, heads + 2 * kv_heads, layer.head_dim))?;
            let rows = |start, heads| all.narrow(1, start, heads)?.contiguous();
            let (mut q, mut k, mut v) = (rows(0, heads)?, rows(heads, kv_heads)?, rows(heads + kv_heads, kv_heads)?);
            if self.shape.norms_keys {
                q = norm(&q, Some(weight("self_attn.q_norm")))?;
                k = norm(&k, Some(weight("self_attn.k_norm")))?;
            }
            if self.shape.norms_values {
                v = norm(&v, None)?;
            }
            let angles = layer.angles(&positions)?;
            let attended = attend(index, &rotate(&q, &angles)?, &rotate(&k, &angles)?, &v)?;
            let y = product(&attended.flatten_from(1)?, "self_attn.o_proj")?;
            x = (x + norm(&y, Some(weight("post_attention_layernorm")))?)?;

            let y = norm(&x, Some(weight("pre_feedforward_layernorm")))?;
            // candle's `gelu` is the approximation with tanh.
            let halves = product(&y, "mlp.gate_up")?.chunk(2, 1)?;
            let y = (halves[0].gelu()? * &halves[1])?;
            let y = product(&y, "mlp.down_proj")?;
            x = (x + norm(&y, Some(weight("post_feedforward_layernorm")))?)?;
        }
        let logits = norm(&x, Some(self.weights.get("norm")))?.matmul(&embeddings.t()?)?;
        match self.shape.final_cap {
            Some(cap) => (logits / cap)?.tanh()? * cap,
            None => Ok(logits),
        }
    }
}

impl Layer {
    /// The angle of each pair of dimensions at these positions, `(tokens, 1, head_dim / 2)`.
    fn angles(&self, positions: &Tensor) -> Result<Tensor> {
        let pairs = self.head_dim / 2;
        let frequency = |pair: usize| {
            let exponent = 2.0 * pair as f64 / self.head_dim as f64;
            if pair < self.rotated_pairs { self.rope_base.powf(-exponent) as f32 } else { 0.0 }
        };
        let frequencies: Vec<f32> = (0..pairs).map(frequency).collect();
        positions.broadcast_mul(&Tensor::from_vec(frequencies, (1, pairs), &Device::Cpu)?)?.unsqueeze(1)
    }
}

/// Gemma's norm: the weights are stored as their differences from one.
fn norm(x: &Tensor, weight: Option<&Tensor>) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = x.broadcast_div(&(mean + EPSILON)?.sqrt()?)?;
    match weight {
        Some(weight) => normed.broadcast_mul(&(weight + 1.0)?),
        None => Ok(normed),
    }
}

/// The rotary embedding: dimension `i` of the first half and dimension `i` of the second half are a pair.
fn rotate(x: &Tensor, angles: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)
}
