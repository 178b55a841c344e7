//! A small model that the tests write themselves.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test binary uses a different part

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use inference::model::{Gguf, Model};
use inference::weights::Weights;

pub const VOCABULARY: usize = 96;

pub type Metadata = BTreeMap<String, Value>;
pub type Tensors = BTreeMap<String, Tensor>;

/// A llama of two layers with weights from a fixed sequence, and a tokenizer for printable ASCII.
pub fn write(path: &Path, architecture: &str) {
    write_changed(path, |metadata, _| {
        metadata.insert("general.architecture".into(), Value::String(architecture.into()));
    });
}

/// Writes the same model after `change`.
pub fn write_changed(path: &Path, change: impl FnOnce(&mut Metadata, &mut Tensors)) {
    let (width, heads, kv_heads, feed) = (32usize, 4u32, 2u32, 64usize);
    let tokens: Vec<Value> =
        ('!'..='~').map(String::from).chain(["Ġ".to_string(), "<end>".to_string()]).map(Value::String).collect();
    assert_eq!(tokens.len(), VOCABULARY);
    let end = tokens.len() as u32 - 1;
    let types = (0..=end).map(|id| Value::I32(if id == end { 3 } else { 1 })).collect();
    let metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.embedding_length", Value::U32(width as u32)),
        ("llama.attention.head_count", Value::U32(heads)),
        ("llama.attention.head_count_kv", Value::U32(kv_heads)),
        ("llama.block_count", Value::U32(2)),
        ("llama.rope.dimension_count", Value::U32(width as u32 / heads)),
        ("llama.context_length", Value::U32(256)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("smollm".into())),
        ("tokenizer.ggml.tokens", Value::Array(tokens)),
        ("tokenizer.ggml.merges", Value::Array(vec![])),
        ("tokenizer.ggml.token_type", Value::Array(types)),
        ("tokenizer.ggml.eos_token_id", Value::U32(end)),
    ];
    let mut state = 1u64;
    let mut random = |rows: usize, columns: usize| {
        let numbers: Vec<f32> = (0..rows * columns)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        Tensor::from_vec(numbers, (rows, columns), &Device::Cpu).unwrap()
    };
    let kv = width * kv_heads as usize / heads as usize;
    let ones = Tensor::ones(width, candle_core::DType::F32, &Device::Cpu).unwrap();
    let mut tensors = vec![
        ("token_embd.weight".to_string(), random(VOCABULARY, width)),
        ("output_norm.weight".to_string(), ones.clone()),
    ];
    for i in 0..2 {
        for (name, tensor) in [
            ("attn_norm", ones.clone()),
            ("attn_q", random(width, width)),
            ("attn_k", random(kv, width)),
            ("attn_v", random(kv, width)),
            ("attn_output", random(width, width)),
            ("ffn_norm", ones.clone()),
            ("ffn_gate", random(feed, width)),
            ("ffn_up", random(feed, width)),
            ("ffn_down", random(width, feed)),
        ] {
            tensors.push((format!("blk.{i}.{name}.weight"), tensor));
        }
    }
    let mut metadata: Metadata = metadata.map(|(key, value)| (key.to_owned(), value)).into();
    let mut tensors: Tensors = tensors.into_iter().collect();
    change(&mut metadata, &mut tensors);
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), QTensor::quantize(tensor, GgmlDType::F32).unwrap()))
        .collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

pub fn load(path: &Path) -> Model {
    Model::load(&mut Gguf::open(path).unwrap(), Weights::F32, usize::MAX).unwrap()
}

/// The model, and the temporary folder with its file, which is removed when it is dropped.
pub fn tiny() -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    write(&path, "llama");
    let model = load(&path);
    (folder, model)
}
