//! The llama architecture over packed rows: the tokens of all sequences are in one tensor, and each layer calls
//! `step.attend` once.

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Embedding, ops, rotary_emb};
use paged_attention::{Attention, KvShape, Step};

use crate::config::Config;
use crate::engine::LanguageModel;
pub use crate::gguf::Gguf;
use crate::weights::{Joined, Linear};

/// A language model.
#[derive(Debug)]
pub struct Model {
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    output: Linear,
    /// `(context, head_dim / 2)`
    cos: Tensor,
    sin: Tensor,
    config: Config,
}

#[derive(Debug)]
struct Layer {
    attention_norm: RmsNorm,
    qkv: Joined,
    o: Linear,
    mlp_norm: RmsNorm,
    gate_up: Joined,
    down: Linear,
}

#[derive(Debug)]
struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    fn load(gguf: &mut Gguf, name: &str) -> Result<Self> {
        Ok(Self { weight: gguf.tensor(name)?.dequantize(&Device::Cpu)?, eps: gguf.config.eps })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        ops::rms_norm(x, &self.weight, self.eps)
    }
}

impl Model {
    /// Loads the weights.
    ///
    /// # Errors
    ///
    /// If a tensor cannot be read.
    pub fn load(gguf: &mut Gguf) -> Result<Self> {
        let config = gguf.config;
        let embedding = gguf.tensor("token_embd.weight")?;
        let table = embedding.dequantize(&Device::Cpu)?;
        let output = match config.tied {
            true => Linear::new(embedding, gguf.weights)?,
            false => linear(gguf, "output.weight")?,
        };
        let layers = (0..config.layers).map(|i| Layer::load(gguf, i)).collect::<Result<_>>()?;
        let (cos, sin) = rotations(&config)?;
        let norm = RmsNorm::load(gguf, "output_norm.weight")?;
        gguf.all_read()?;
        Ok(Self { embedding: Embedding::new(table, config.width), layers, norm, output, cos, sin, config })
    }

    /// What the cache stores for each token: the number of layers and heads, and the size of a head.
    pub fn shape(&self) -> KvShape {
        self.config.shape()
    }

    /// The number of tokens in the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.config.vocabulary
    }

    /// The maximum number of tokens in a sequence.
    pub fn context(&self) -> usize {
        self.config.context
    }

    /// One forward pass: the logits of the rows whose logits are wanted, `(rows, vocabulary)`.
    ///
    /// # Errors
    ///
    /// If a token is not in the vocabulary, or a tensor operation fails.
    pub fn forward(&self, step: &Step<'_>) -> candle_core::Result<Tensor> {
        let attention = Attention::scaled_by(self.config.head_dim);
        let attend = |i: usize, q: &Tensor, k: &Tensor, v: &Tensor| step.attend(i, q, k, v, &attention);
        self.logits(&step.token_ids()?, &step.positions()?, &step.logits_rows()?, attend)
    }

    /// The logits of the rows `wanted`, `(rows, vocabulary)`, with any attention: `attend` gets the layer, q, k and v,
    /// each `(tokens, heads, head_dim)`, and returns a tensor of the shape of q. The model's head is applied to the
    /// wanted rows only, which can be none.
    pub(crate) fn logits(
        &self,
        token_ids: &Tensor,
        positions: &Tensor,
        wanted: &Tensor,
        attend: impl Fn(usize, &Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let rows = token_ids.elem_count();
        let Config { heads, kv_heads, head_dim, .. } = self.config;
        let half = (rows, 1, head_dim / 2);
        let cos = self.cos.index_select(positions, 0)?.reshape(half)?;
        let sin = self.sin.index_select(positions, 0)?.reshape(half)?;
        // Each row is an entry of the batch with one token, so that each row has its own position.
        let rotate = |x: &Tensor, heads: usize| {
            let x = x.reshape((rows, heads, 1, head_dim))?;
            rotary_emb::rope_i(&x, &cos, &sin)?.reshape((rows, heads, head_dim))
        };

        let mut x = self.embedding.forward(token_ids)?; // (tokens, width)
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = layer.attention_norm.forward(&x)?;
            let qkv = layer.qkv.forward(&normed)?;
            let q = rotate(&qkv[0], heads)?;
            let k = rotate(&qkv[1], kv_heads)?;
            let v = qkv[2].reshape((rows, kv_heads, head_dim))?;
            let y = attend(i, &q, &k, &v)?; // (tokens, heads, head_dim)
            x = (layer.o.forward(&y.flatten_from(1)?)? + x)?;

            let normed = layer.mlp_norm.forward(&x)?;
            let gate_up = layer.gate_up.forward(&normed)?;
            let gated = (ops::silu(&gate_up[0])? * &gate_up[1])?;
            x = (layer.down.forward(&gated)? + x)?;
        }
        if wanted.elem_count() == 0 {
            return Tensor::zeros((0, self.config.vocabulary), DType::F32, x.device());
        }
        let wanted = x.index_select(wanted, 0)?;
        self.output.forward(&self.norm.forward(&wanted)?)
    }
}

impl LanguageModel for Model {
    fn context(&self) -> usize {
        self.config.context
    }

    fn forward(&self, step: &Step<'_>) -> candle_core::Result<Tensor> {
        Model::forward(self, step)
    }
}

impl Layer {
    fn load(gguf: &mut Gguf, i: usize) -> Result<Self> {
        let name = |part: &str| format!("blk.{i}.{part}.weight");
        Ok(Self {
            attention_norm: RmsNorm::load(gguf, &name("attn_norm"))?,
            qkv: joined(gguf, &["attn_q", "attn_k", "attn_v"].map(name))?,
            o: linear(gguf, &name("attn_output"))?,
            mlp_norm: RmsNorm::load(gguf, &name("ffn_norm"))?,
            gate_up: joined(gguf, &["ffn_gate", "ffn_up"].map(name))?,
            down: linear(gguf, &name("ffn_down"))?,
        })
    }
}

fn linear(gguf: &mut Gguf, name: &str) -> Result<Linear> {
    Linear::new(gguf.tensor(name)?, gguf.weights)
}

fn joined(gguf: &mut Gguf, names: &[String]) -> Result<Joined> {
    let tensors = names.iter().map(|name| gguf.tensor(name)).collect::<Result<_>>()?;
    Joined::new(tensors, gguf.weights)
}

/// Cosines and sines of the rotary embedding (Su et al. 2021), each `(context, head_dim / 2)`.
fn rotations(config: &Config) -> Result<(Tensor, Tensor)> {
    let Config { context, head_dim, base, .. } = *config;
    let speeds: Vec<f32> = (0..head_dim / 2).map(|i| 1.0 / base.powf(2.0 * i as f32 / head_dim as f32)).collect();
    let speeds = Tensor::from_vec(speeds, (1, head_dim / 2), &Device::Cpu)?;
    let positions = Tensor::arange(0, context as u32, &Device::Cpu)?.to_dtype(DType::F32)?.unsqueeze(1)?;
    let angles = positions.matmul(&speeds)?;
    Ok((angles.cos()?, angles.sin()?))
}

#[cfg(test)]
mod tests {
    use paged_attention::KvCache;

    use super::*;
    use crate::weights::Weights;

    /// The integration tests check the same with a small model. This one has thirty layers, whose rounding errors add
    /// up.
    #[test]
    fn packed_logits_of_the_real_model_equal_those_of_each_sequence_alone() {
        let Some(path) = crate::model_file::for_test().unwrap() else { return };
        let model = Model::load(&mut Gguf::open(&path, Weights::F32).unwrap()).unwrap();
        let prompts: Vec<Vec<u32>> =
            [1, 17, 64, 130].iter().map(|&n| (0..n).map(|i| 100 + (i * 7919 + n) % 40_000).collect()).collect();
        let logits = |prompts: &[Vec<u32>]| {
            let cache = KvCache::builder(model.shape()).blocks(32).build().unwrap();
            let mut tables: Vec<_> = prompts.iter().map(|_| cache.table()).collect();
            let mut step = cache.step();
            for (table, prompt) in tables.iter_mut().zip(prompts) {
                step.push(table, prompt).unwrap();
            }
            model.forward(&step).unwrap().to_vec2::<f32>().unwrap()
        };
        let packed = logits(&prompts);
        for (prompt, packed) in prompts.iter().zip(&packed) {
            let alone = &logits(std::slice::from_ref(prompt))[0];
            let largest = alone.iter().fold(0f32, |m, x| m.max(x.abs()));
            let worst = alone.iter().zip(packed).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            println!("{} tokens: {:e} of the largest logit", prompt.len(), worst / largest);
            assert!(worst / largest < 1e-4);
        }
    }
}
