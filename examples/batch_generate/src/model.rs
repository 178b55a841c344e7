//! The llama architecture over packed rows: all sequences' tokens in one tensor, one `step.attend` a layer.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Embedding, ops, rotary_emb};
use paged_attention::{Attention, KvShape, Step};

use crate::engine::LanguageModel;
use crate::weights::{Joined, Linear, Weights};

/// A GGUF file of the llama architecture, opened.
#[derive(Debug)]
pub struct Gguf {
    /// Its metadata.
    pub content: Content,
    reader: BufReader<File>,
    weights: Weights,
}

impl Gguf {
    /// Opens `path` and reads its metadata.
    ///
    /// # Errors
    ///
    /// If it is not a GGUF file, or one of another architecture.
    pub fn open(path: &Path, weights: Weights) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut reader = BufReader::new(file);
        let content = Content::read(&mut reader)
            .with_context(|| format!("{} is not a GGUF file, or is damaged", path.display()))?;
        match content.metadata.get("general.architecture") {
            Some(Value::String(name)) if name == "llama" => Ok(Self { content, reader, weights }),
            Some(Value::String(name)) => bail!("{} is a {name} model, only llama is supported", path.display()),
            _ => bail!("{} does not say what architecture it is", path.display()),
        }
    }

    fn number(&self, key: &str) -> Result<usize> {
        let value = self.content.metadata.get(key).with_context(|| format!("the model file lacks `{key}`"))?;
        let number = value.to_u32().with_context(|| format!("`{key}` of the model file is not a number"))?;
        Ok(number as usize)
    }

    fn float(&self, key: &str) -> Result<Option<f32>> {
        let value = self.content.metadata.get(key);
        value.map(|v| v.to_f32().with_context(|| format!("`{key}` of the model file is not a number"))).transpose()
    }

    fn linear(&mut self, name: &str) -> Result<Linear> {
        Linear::new(self.tensor(name)?, self.weights)
    }

    fn joined(&mut self, names: &[String]) -> Result<Joined> {
        let tensors = names.iter().map(|name| self.tensor(name)).collect::<Result<_>>()?;
        Joined::new(tensors, self.weights)
    }

    fn tensor(&mut self, name: &str) -> Result<QTensor> {
        self.content
            .tensor(&mut self.reader, name, &Device::Cpu)
            .with_context(|| format!("cannot read `{name}` of the model file: it is truncated or damaged"))
    }

    fn norm(&mut self, name: &str, eps: f32) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: self.tensor(name)?.dequantize(&Device::Cpu)?, eps })
    }
}

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
    shape: KvShape,
    heads: usize,
    context: usize,
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
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        ops::rms_norm(x, &self.weight, self.eps)
    }
}

impl Model {
    /// Loads the weights.
    ///
    /// # Errors
    ///
    /// If something is missing, damaged or contradictory.
    pub fn load(gguf: &mut Gguf) -> Result<Self> {
        let width = gguf.number("llama.embedding_length")?;
        let heads = gguf.number("llama.attention.head_count")?;
        let kv_heads = gguf.number("llama.attention.head_count_kv")?;
        let layers = gguf.number("llama.block_count")?;
        let head_dim = gguf.number("llama.rope.dimension_count")?;
        let context = gguf.number("llama.context_length")?;
        let eps = gguf.float("llama.attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5);
        let base = gguf.float("llama.rope.freq_base")?.unwrap_or(10_000.0);
        ensure!(
            kv_heads > 0 && heads % kv_heads == 0 && heads * head_dim == width && head_dim % 2 == 0,
            "the model file contradicts itself: width {width}, {heads} heads x {head_dim}, {kv_heads} key heads"
        );
        ensure!(
            gguf.number("llama.expert_count").unwrap_or(0) <= 1,
            "the model is a mixture of experts, only dense models are supported"
        );

        let embedding = gguf.tensor("token_embd.weight")?;
        let table = embedding.dequantize(&Device::Cpu)?;
        let output = match gguf.content.tensor_infos.contains_key("output.weight") {
            true => gguf.linear("output.weight")?,
            // Tied: the embedding read the other way round.
            false => Linear::new(embedding, gguf.weights)?,
        };
        let layers: Vec<_> = (0..layers).map(|i| Layer::load(gguf, i, eps)).collect::<Result<_>>()?;
        let (cos, sin) = rotations(context, head_dim, base)?;
        Ok(Self {
            embedding: Embedding::new(table, width),
            shape: KvShape { layers: layers.len(), kv_heads, head_dim },
            layers,
            norm: gguf.norm("output_norm.weight", eps)?,
            output,
            cos,
            sin,
            heads,
            context,
        })
    }

    /// What each token leaves in the cache.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// How many different tokens there are.
    pub fn vocabulary(&self) -> usize {
        self.embedding.embeddings().dims()[0]
    }

    /// The most tokens a sequence can have.
    pub fn context(&self) -> usize {
        self.context
    }

    /// One forward pass: the logits of each sequence's last token, `(sequences, vocabulary)`.
    ///
    /// # Errors
    ///
    /// If a token is not in the vocabulary, or a tensor operation fails.
    pub fn forward(&self, step: &Step<'_>) -> candle_core::Result<Tensor> {
        let attention = Attention::scaled_by(self.shape.head_dim);
        let attend = |i: usize, q: &Tensor, k: &Tensor, v: &Tensor| step.attend(i, q, k, v, &attention);
        self.logits(&step.token_ids()?, &step.positions()?, &step.last_rows()?, attend)
    }

    /// The logits of some rows, `(rows, vocabulary)`, with any attention: `attend` gets the layer, q, k and v, each
    /// `(tokens, heads, head_dim)`, and returns what q has.
    pub(crate) fn logits(
        &self,
        token_ids: &Tensor,
        positions: &Tensor,
        wanted: &Tensor,
        attend: impl Fn(usize, &Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let rows = token_ids.elem_count();
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let half = (rows, 1, head_dim / 2);
        let cos = self.cos.index_select(positions, 0)?.reshape(half)?;
        let sin = self.sin.index_select(positions, 0)?.reshape(half)?;
        // Each row is a batch of its own of one token, so that each has its own position.
        let rotate = |x: &Tensor, heads: usize| {
            let x = x.reshape((rows, heads, 1, head_dim))?;
            rotary_emb::rope_i(&x, &cos, &sin)?.reshape((rows, heads, head_dim))
        };

        let mut x = self.embedding.forward(token_ids)?; // (tokens, width)
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = layer.attention_norm.forward(&x)?;
            let qkv = layer.qkv.forward(&normed)?;
            let q = rotate(&qkv[0], self.heads)?;
            let k = rotate(&qkv[1], kv_heads)?;
            let v = qkv[2].reshape((rows, kv_heads, head_dim))?;
            let y = attend(i, &q, &k, &v)?; // (tokens, heads, head_dim)
            x = (layer.o.forward(&y.flatten_from(1)?)? + x)?;

            let normed = layer.mlp_norm.forward(&x)?;
            let gate_up = layer.gate_up.forward(&normed)?;
            let gated = (ops::silu(&gate_up[0])? * &gate_up[1])?;
            x = (layer.down.forward(&gated)? + x)?;
        }
        let wanted = x.index_select(wanted, 0)?;
        self.output.forward(&self.norm.forward(&wanted)?)
    }
}

impl LanguageModel for Model {
    fn context(&self) -> usize {
        self.context
    }

    fn forward(&self, step: &Step<'_>) -> candle_core::Result<Tensor> {
        Model::forward(self, step)
    }
}

impl Layer {
    fn load(gguf: &mut Gguf, i: usize, eps: f32) -> Result<Self> {
        let name = |part: &str| format!("blk.{i}.{part}.weight");
        Ok(Self {
            attention_norm: gguf.norm(&name("attn_norm"), eps)?,
            qkv: gguf.joined(&["attn_q", "attn_k", "attn_v"].map(name))?,
            o: gguf.linear(&name("attn_output"))?,
            mlp_norm: gguf.norm(&name("ffn_norm"), eps)?,
            gate_up: gguf.joined(&["ffn_gate", "ffn_up"].map(name))?,
            down: gguf.linear(&name("ffn_down"))?,
        })
    }
}

/// Cosines and sines of the rotary embedding (Su et al. 2021), each `(context, head_dim / 2)`.
fn rotations(context: usize, head_dim: usize, base: f32) -> Result<(Tensor, Tensor)> {
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

    /// The small model of the integration tests has this too; here are thirty layers, whose rounding adds up.
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
