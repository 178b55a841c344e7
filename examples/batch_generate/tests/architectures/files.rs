//! Writes a model file with random weights.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use test_support::Random;

use crate::naive::Spec;

pub(crate) const VOCABULARY: usize = 96;

/// The metadata and the tensors of a file.
#[derive(Debug, Clone)]
pub(crate) struct ModelFile {
    pub(crate) metadata: BTreeMap<String, Value>,
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

impl ModelFile {
    /// The dimensions and the random weights that `spec` says.
    pub(crate) fn random(spec: &Spec, seed: u64) -> Self {
        let mut file = Self { metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        file.key("general.architecture", Value::String(spec.architecture.into()));
        for (key, number) in [
            ("embedding_length", spec.width),
            ("block_count", spec.windows.len()),
            ("context_length", spec.context),
            ("attention.head_count", spec.heads),
            ("attention.head_count_kv", spec.kv_heads),
            ("attention.key_length", spec.head_dim),
            ("attention.value_length", spec.head_dim),
            ("rope.dimension_count", spec.rotated),
            ("feed_forward_length", spec.feed_forward),
        ] {
            file.key(&format!("{}.{key}", spec.architecture), Value::U32(number as u32));
        }
        file.key(&format!("{}.attention.layer_norm_rms_epsilon", spec.architecture), Value::F32(spec.eps as f32));
        if let Some((count, used)) = spec.experts {
            for (key, number) in [
                ("expert_count", count),
                ("expert_used_count", used),
                ("expert_feed_forward_length", spec.feed_forward),
            ] {
                file.key(&format!("{}.{key}", spec.architecture), Value::U32(number as u32));
            }
        }
        let mut random = Random::new(seed);
        for (name, shape) in spec.tensors() {
            // Scores that differ, so that attention is neither even nor one-hot.
            let gain = if name.contains("attn_q.") || name.contains("attn_k.") { 2.0 } else { 1.0 };
            let (spread, middle) = match shape.last() {
                _ if name.ends_with("norm.weight") => (0.3, 1.0),
                _ if name.ends_with(".bias") => (0.5, 0.0),
                Some(&inputs) => (gain * (3.0 / inputs as f32).sqrt(), 0.0),
                None => (1.0, 0.0),
            };
            let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| middle + spread * random.number()).collect();
            file.tensors.insert(name, Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap());
        }
        file
    }

    /// Sets a key.
    pub(crate) fn key(&mut self, key: &str, value: Value) {
        self.metadata.insert(key.to_owned(), value);
    }

    /// Sets a key below the architecture's name.
    pub(crate) fn own_key(&mut self, key: &str, value: Value) {
        let Some(Value::String(architecture)) = self.metadata.get("general.architecture") else { panic!() };
        self.key(&format!("{architecture}.{key}"), value);
    }

    /// The numbers of a tensor.
    pub(crate) fn numbers(&self, name: &str) -> Vec<f32> {
        self.tensors[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The same with matrices rounded to this type.
    pub(crate) fn rounded(&self, matrices: GgmlDType) -> Self {
        let rounded = |tensor: &Tensor| match tensor.rank() {
            1 => tensor.clone(),
            _ => QTensor::quantize(tensor, matrices).unwrap().dequantize(&Device::Cpu).unwrap(),
        };
        let tensors = self.tensors.iter().map(|(name, tensor)| (name.clone(), rounded(tensor))).collect();
        Self { metadata: self.metadata.clone(), tensors }
    }

    /// Writes the file with matrices of this type.
    pub(crate) fn write(&self, path: &Path, matrices: GgmlDType) {
        let quantized = |tensor: &Tensor| {
            let dtype = if tensor.rank() > 1 { matrices } else { GgmlDType::F32 };
            QTensor::quantize(tensor, dtype).unwrap()
        };
        let tensors: Vec<_> = self.tensors.iter().map(|(name, tensor)| (name.as_str(), quantized(tensor))).collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }
}
