//! Random weights, under the names that candle's models have.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use test_support::Random;

use crate::decoder::{Shape, VOCABULARY};

#[derive(Debug, Clone)]
pub(crate) struct Weights(HashMap<String, Tensor>);

impl Weights {
    /// Matrices that keep the variance of what they are multiplied with, and norms that differ from one.
    ///
    /// With one exception: queries and keys are larger, so that scores differ by much and a token attends to a few
    /// others, and embeddings are smaller, so that the next token is not decided by the last one alone. Otherwise the
    /// models soon repeat one token.
    pub(crate) fn random(shape: &Shape, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut weights = HashMap::new();
        let mut add = |name: &str, dims: &[usize], scale: f64, mean: f64| {
            let numbers = random.numbers(dims.iter().product());
            let tensor = Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap().affine(scale, mean).unwrap();
            weights.insert(format!("model.{name}.weight"), tensor);
        };
        // The variance of a number in [-1, 1) is a third.
        let of_inputs = |n: usize| (3.0 / n as f64).sqrt();
        let (hidden, feed) = (shape.hidden, shape.feed);
        add("embed_tokens", &[VOCABULARY, hidden], 0.3 * of_inputs(hidden), 0.0);
        add("norm", &[hidden], 0.3, 0.0);
        for (index, layer) in shape.layers.iter().enumerate() {
            let mut matrix = |name: &str, outputs: usize, inputs: usize| {
                let gain = if ["self_attn.q_proj", "self_attn.k_proj"].contains(&name) { 2.0 } else { 1.0 };
                add(&format!("layers.{index}.{name}"), &[outputs, inputs], gain * of_inputs(inputs), 0.0);
            };
            matrix("self_attn.q_proj", shape.heads * layer.head_dim, hidden);
            matrix("self_attn.k_proj", layer.kv_heads * layer.head_dim, hidden);
            matrix("self_attn.v_proj", layer.kv_heads * layer.head_dim, hidden);
            matrix("self_attn.o_proj", hidden, shape.heads * layer.head_dim);
            matrix("mlp.gate_proj", feed, hidden);
            matrix("mlp.up_proj", feed, hidden);
            matrix("mlp.down_proj", hidden, feed);
            for name in ["input", "post_attention", "pre_feedforward", "post_feedforward"] {
                add(&format!("layers.{index}.{name}_layernorm"), &[hidden], 0.3, 0.0);
            }
            if shape.norms_keys {
                add(&format!("layers.{index}.self_attn.q_norm"), &[layer.head_dim], 0.3, 1.0);
                add(&format!("layers.{index}.self_attn.k_norm"), &[layer.head_dim], 0.3, 1.0);
            }
        }
        join(&mut weights, shape.layers.len());
        Self(weights)
    }

    pub(crate) fn get(&self, name: &str) -> &Tensor {
        &self.0[&format!("model.{name}.weight")]
    }

    /// For candle's models, which do not need the joined ones.
    pub(crate) fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_tensors(self.0.clone(), DType::F32, &Device::Cpu)
    }
}

/// Adds matrices that are applied together as one. candle reads `/proc/cpuinfo` for each product, unless a variable tells
/// it the number of threads, and that takes longer than the products of these models.
fn join(weights: &mut HashMap<String, Tensor>, layers: usize) {
    let parts = [
        ("self_attn.qkv", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..]),
        ("mlp.gate_up", &["mlp.gate_proj", "mlp.up_proj"][..]),
    ];
    for (layer, (name, parts)) in (0..layers).flat_map(|layer| parts.map(|of| (layer, of))) {
        let full = |name: &str| format!("model.layers.{layer}.{name}.weight");
        let parts: Vec<&Tensor> = parts.iter().map(|part| &weights[&full(part)]).collect();
        let joined = Tensor::cat(&parts, 0).unwrap();
        weights.insert(full(name), joined);
    }
}
