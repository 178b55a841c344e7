//! The model that paged answers are compared with.

use std::fs::File;
use std::io::Cursor;
use std::path::Path;

use anyhow::Result;
use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_transformers::models::{quantized_llama, quantized_phi3, quantized_qwen2, quantized_qwen3};

use super::contiguous::Contiguous;
use inference::config::{Config, RopeFactors};
use inference::model::Model;
use inference::rope::{Rope, Scaling};
use inference::weights::Weights;

/// A model with a contiguous cache, for one sequence.
pub(crate) enum Reference<'m> {
    Llama(Box<quantized_llama::ModelWeights>),
    Qwen2(Box<quantized_qwen2::ModelWeights>),
    Qwen3(Box<quantized_qwen3::ModelWeights>),
    Phi3(Box<quantized_phi3::ModelWeights>),
    /// candle has no model that computes what the file says.
    Own(Contiguous<'m>),
}

impl<'m> Reference<'m> {
    /// candle's own model of the file `path`, if it has one, with its weights kept in memory in the same way as those of
    /// `model`, which is of the same file.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub(crate) fn load(path: &Path, model: &'m Model, weights: Weights) -> Result<Self> {
        if !is_computed_by_candle(model.config()) {
            return Ok(Self::Own(Contiguous::new(model)));
        }
        let mut file = File::open(path)?;
        let content = Content::read(&mut file)?;
        // candle's models read their weights only from a file.
        let mut file = Cursor::new(converted(&content, &mut file, model.config(), weights)?);
        let content = Content::read(&mut file)?;
        let (file, device) = (&mut file, &Device::Cpu);
        Ok(match model.config().architecture.name {
            "qwen2" => Self::Qwen2(quantized_qwen2::ModelWeights::from_gguf(content, file, device)?.into()),
            "qwen3" => Self::Qwen3(quantized_qwen3::ModelWeights::from_gguf(content, file, device)?.into()),
            "phi3" => Self::Phi3(quantized_phi3::ModelWeights::from_gguf(false, content, file, device)?.into()),
            _ => Self::Llama(quantized_llama::ModelWeights::from_gguf(content, file, device)?.into()),
        })
    }

    /// The most tokens of a sequence.
    pub(crate) fn limit(config: &Config) -> usize {
        match is_computed_by_candle(config) && config.architecture.name == "llama" {
            true => quantized_llama::MAX_SEQ_LEN,
            false => config.context,
        }
    }

    /// For messages.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Own(_) => "the same model with a contiguous cache, since candle has none of its own",
            _ => "candle's own model and cache",
        }
    }

    pub(crate) fn is_candle(&self) -> bool {
        !matches!(self, Self::Own(_))
    }

    /// Begins a new sequence.
    pub(crate) fn clear(&mut self) {
        match self {
            Self::Llama(model) => model.clear_kv_cache(),
            Self::Qwen2(model) => model.clear_kv_cache(),
            Self::Qwen3(model) => model.clear_kv_cache(),
            // Position 0 clears it.
            Self::Phi3(_) => {}
            Self::Own(model) => model.clear(),
        }
    }

    /// Computes `tokens`, the first of which has the position `position`. Returns the logits of the last one.
    pub(crate) fn forward(&mut self, tokens: &[u32], position: usize) -> Result<Vec<f32>> {
        let rows = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        let logits = match self {
            Self::Llama(model) => model.forward(&rows, position),
            Self::Qwen2(model) => model.forward(&rows, position),
            Self::Qwen3(model) => model.forward(&rows, position),
            Self::Phi3(model) => model.forward(&rows, position),
            Self::Own(model) => return model.forward(tokens, position),
        };
        Ok(logits?.flatten_all()?.to_vec1()?)
    }
}

/// Whether candle has a model for this architecture, and computes all that the file says. Its models of quantized files
/// know no windows, biases outside Qwen 2, scaling or partial rotation; that of Phi-3 has one base and an output matrix
/// of its own; that of Gemma 3 has the wrong activation.
fn is_computed_by_candle(config: &Config) -> bool {
    let plain = config.windows.iter().all(Option::is_none)
        && config.rope == Rope { scaling: Scaling::None, magnitude: 1.0, dims: config.head_dim, ..config.rope.clone() }
        && config.rope_factors == RopeFactors::None
        && (config.score_cap, config.logit_cap) == (None, None)
        && config.score_scale == 1.0 / (config.head_dim as f32).sqrt();
    let square = config.width == config.heads * config.head_dim;
    let of_architecture = match config.architecture.name {
        "llama" => square && config.biases.is_empty(),
        "qwen2" => square && config.biases == ["attn_q", "attn_k", "attn_v"],
        "qwen3" => config.biases.is_empty(),
        "phi3" => square && config.biases.is_empty() && config.rope.base == 10_000.0 && !config.tied,
        _ => false,
    };
    plain && of_architecture
}

/// The same model as a GGUF file with matrices of this kind.
fn converted(content: &Content, file: &mut File, config: &Config, weights: Weights) -> Result<Vec<u8>> {
    let prefix = format!("{}.", config.architecture.name);
    let mut metadata: Vec<(&str, &Value)> = content
        .metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .filter(|(key, _)| key.starts_with(&prefix) || *key == "general.architecture")
        .collect();
    // Without this, candle's Qwen 3 computes in f16.
    metadata.push(("general.dtype", &Value::U32(0)));
    // It needs these, too.
    let needed = [
        (format!("{prefix}rope.freq_base"), Value::F32(config.rope.base)),
        (format!("{prefix}attention.key_length"), Value::U32(config.head_dim as u32)),
    ];
    metadata.extend(needed.iter().filter(|(key, _)| !content.metadata.contains_key(key)).map(|(k, v)| (k.as_str(), v)));
    let tensors = content
        .tensor_infos
        .keys()
        .map(|name| {
            let tensor = content.tensor(file, name, &Device::Cpu)?;
            let dtype = match weights {
                Weights::F32 => GgmlDType::F32,
                Weights::Int8 => GgmlDType::Q8_0,
                Weights::Stored => return Ok((name.as_str(), tensor)),
            };
            let tensor = tensor.dequantize(&Device::Cpu)?;
            let dtype = if tensor.rank() == 2 { dtype } else { GgmlDType::F32 };
            Ok((name.as_str(), QTensor::quantize(&tensor, dtype)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let mut bytes = Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &metadata, &tensors)?;
    Ok(bytes.into_inner())
}
