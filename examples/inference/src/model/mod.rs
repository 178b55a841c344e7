//! A decoder over packed rows, for every architecture of the table: the tokens of all sequences are in one tensor, and
//! each layer calls `step.attend` once.
//!
//! - `layer` has a layer's attention and what is around it.
//! - `feed_forward` has a layer's feed-forward, one or many experts.
//! - `norm` has the norm that all of them use.

mod feed_forward;
mod layer;
mod norm;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::Embedding;
use paged_attention::{Attention, LayerGroup, Step};

use crate::config::{Config, RopeFactors};
use crate::engine::LanguageModel;
pub use crate::gguf::Gguf;
use crate::rope::Rope;
use crate::tensors::ROPE_FACTORS;
use crate::weights::{Linear, Weights};
use layer::{Layer, Rotation};
use norm::RmsNorm;

/// A language model.
#[derive(Debug)]
pub struct Model {
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    output: Linear,
    rotations: Rotations,
    config: Config,
    /// The number of positions that have angles.
    context: usize,
}

/// Cosines and sines of the rotary embedding, each `(positions, dims / 2)`.
#[derive(Debug)]
struct Rotations {
    full: (Tensor, Tensor),
    /// Of layers with a window, if they differ.
    local: Option<(Tensor, Tensor)>,
}

impl Model {
    /// Loads the weights, for sequences of at most `longest` tokens, and no more than the model's context.
    ///
    /// # Errors
    ///
    /// If a tensor cannot be read, or the model does not fit into this machine.
    pub fn load(gguf: &mut Gguf, weights: Weights, longest: usize) -> Result<Self> {
        Self::load_with(gguf, weights, longest, |_, _| ())
    }

    /// The same, and calls `progress` with the number of layers that are loaded, and of all.
    ///
    /// # Errors
    ///
    /// As [`Model::load`].
    pub fn load_with(
        gguf: &mut Gguf,
        weights: Weights,
        longest: usize,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self> {
        gguf.check_memory(weights, longest)?;
        let config = gguf.config().clone();
        let context = longest.min(config.context);
        ensure!(context > 0, "sequences of 0 tokens need no model");
        let rotations = Rotations::load(gguf, context)?;
        let embedding = gguf.tensor("token_embd.weight")?;
        let table = embedding.dequantize(&Device::Cpu)?;
        let output = match config.tied {
            // In f32 it is the table itself.
            true if weights == Weights::F32 => Linear::shared(table.clone()),
            true => Linear::new(embedding, None, weights)?,
            false => Linear::new(gguf.tensor("output.weight")?, None, weights)?,
        };
        let mut layers = Vec::new();
        for i in 0..config.layers() {
            progress(i, config.layers());
            layers.push(Layer::load(gguf, i, weights)?);
        }
        let norm = RmsNorm::load(gguf, "output_norm.weight")?;
        gguf.all_read()?;
        let embedding = Embedding::new(table, config.width);
        Ok(Self { embedding, layers, norm, output, rotations, config, context })
    }

    /// What the cache stores for each token: the groups of layers.
    pub fn groups(&self) -> Vec<LayerGroup> {
        self.config.groups()
    }

    /// The number of tokens in the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.config.vocabulary
    }

    /// What its file says about it.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// One forward pass: the logits of the rows whose logits are wanted, `(rows, vocabulary)`.
    ///
    /// # Errors
    ///
    /// If a token is not in the vocabulary, a position is beyond the model's context, or a tensor operation fails.
    pub fn forward(&self, step: &Step<'_>) -> candle_core::Result<Tensor> {
        self.forward_with(step, &self.attention())
    }

    /// The same with other options of [`attention`](Self::attention).
    pub fn forward_with(&self, step: &Step<'_>, attention: &Attention) -> candle_core::Result<Tensor> {
        let attend = |i: usize, q: &Tensor, k: &Tensor, v: &Tensor| step.attend(i, q, k, v, attention);
        self.logits(&step.token_ids()?, &step.positions()?, &step.logits_rows()?, attend)
    }

    /// The logits of the rows `wanted`, `(rows, vocabulary)`, with any attention: `attend` gets the layer, q, k and v,
    /// each `(tokens, heads, head_dim)`, and returns a tensor of the shape of q. The model's head is applied to the
    /// wanted rows only, which can be none.
    pub fn logits(
        &self,
        token_ids: &Tensor,
        positions: &Tensor,
        wanted: &Tensor,
        mut attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let full = Rotation::at(&self.rotations.full, positions, &self.config)?;
        let local = self.rotations.local.as_ref();
        let local = local.map(|tables| Rotation::at(tables, positions, &self.config)).transpose()?;

        let mut x = self.embedding.forward(token_ids)?; // (tokens, width)
        if self.config.architecture.scaled_embeddings {
            x = (x * (self.config.width as f64).sqrt())?;
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let rotation = local.as_ref().filter(|_| self.config.windows[i].is_some()).unwrap_or(&full);
            x = layer.forward(&x, rotation, &self.config, |q, k, v| attend(i, q, k, v))?;
        }
        if wanted.elem_count() == 0 {
            return Tensor::zeros((0, self.config.vocabulary), DType::F32, x.device());
        }
        let wanted = x.index_select(wanted, 0)?;
        let logits = self.output.forward(&self.norm.forward(&wanted)?)?;
        match self.config.logit_cap {
            Some(cap) => (logits / f64::from(cap))?.tanh()? * f64::from(cap),
            None => Ok(logits),
        }
    }
}

impl LanguageModel for Model {
    fn context(&self) -> usize {
        self.context
    }

    fn attention(&self) -> Attention {
        self.config.attention()
    }

    fn forward(&self, step: &Step<'_>) -> candle_core::Result<Tensor> {
        Model::forward(self, step)
    }
}

impl Rotations {
    fn load(gguf: &mut Gguf, context: usize) -> Result<Self> {
        let config = gguf.config().clone();
        let [freqs, long, short] = ROPE_FACTORS;
        let name = match config.rope_factors {
            RopeFactors::None => None,
            RopeFactors::Always => Some(freqs),
            // One kind for the whole run: keys in the cache are rotated already.
            RopeFactors::ByLength { original } => Some(if context > original { long } else { short }),
        };
        let factors = name.map(|name| gguf.numbers(name)).transpose()?;
        let tables = |rope: &Rope| rope.tables(context, factors.as_deref());
        let local = config.windows.iter().any(Option::is_some) && config.local_rope != config.rope;
        Ok(Self { full: tables(&config.rope)?, local: local.then(|| tables(&config.local_rope)).transpose()? })
    }
}

#[cfg(test)]
mod tests {
    use paged_attention::KvCache;

    use super::*;

    /// The integration tests check the same with small models. This one has thirty layers, whose rounding errors add
    /// up.
    #[test]
    fn packed_logits_of_the_real_model_equal_those_of_each_sequence_alone() {
        let Some(path) = crate::model_file::for_test().unwrap() else { return };
        let model = Model::load(&mut Gguf::open(&path).unwrap(), Weights::F32, 256).unwrap();
        let prompts: Vec<Vec<u32>> =
            [1, 17, 64, 130].iter().map(|&n| (0..n).map(|i| 100 + (i * 7919 + n) % 40_000).collect()).collect();
        let logits = |prompts: &[Vec<u32>]| {
            let cache = KvCache::builder_of(model.groups()).blocks(32).build().unwrap();
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
