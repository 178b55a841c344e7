//! DeepSeek-V2 with random weights: its attention over latents in the absorbed form (section 2.1.3 of the paper), where
//! the products that make keys and values of a latent are applied to queries and results instead.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, ops, rotary_emb};
use candle_transformers::models::deepseek2::{DeepSeekV2, DeepSeekV2Config};
use paged_attention::{Attention, KvShape, Step};
use test_support::Random;

pub(crate) const VOCABULARY: usize = 96;
pub(crate) const CONTEXT: usize = 256;
const LAYERS: usize = 3;
const HIDDEN: usize = 48;
const FEED: usize = 64;
const HEADS: usize = 6;
/// The latent vector, which has the values and, for each head, the part of the key without positions.
const LATENT: usize = 40;
/// The part of the key with positions, which all heads share.
const ROPE: usize = 8;
const NOPE: usize = 16;
const VALUE: usize = 12;
/// The rank of the queries' projection, in the larger models.
const Q_RANK: usize = 20;
const BASE: f32 = 10_000.0;
const EPSILON: f32 = 1e-6;

/// What the cache stores: one latent and one rotated part for each token and layer.
pub(crate) const SHAPE: KvShape = KvShape::new(LAYERS, 1, LATENT + ROPE).values_in_keys(LATENT);

pub(crate) struct Decoder {
    weights: HashMap<String, Tensor>,
    /// Whether queries have a projection of low rank.
    low_rank_queries: bool,
}

impl Decoder {
    pub(crate) fn random(low_rank_queries: bool) -> Self {
        let mut random = Random::new(31);
        let mut weights = HashMap::new();
        let mut add = |name: String, dims: &[usize], scale: f64, mean: f64| {
            let numbers = random.numbers(dims.iter().product());
            let tensor = Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap().affine(scale, mean).unwrap();
            weights.insert(format!("{name}.weight"), tensor);
        };
        // The variance of a number in [-1, 1) is a third.
        let of_inputs = |n: usize| (3.0 / n as f64).sqrt();
        add("model.embed_tokens".into(), &[VOCABULARY, HIDDEN], 1.0, 0.0);
        add("lm_head".into(), &[VOCABULARY, HIDDEN], of_inputs(HIDDEN), 0.0);
        add("model.norm".into(), &[HIDDEN], 0.3, 1.0);
        for layer in 0..LAYERS {
            let name = |name: &str| format!("model.layers.{layer}.{name}");
            let mut matrix = |of: &str, outputs: usize, inputs: usize| {
                // Queries and keys are larger, so that scores differ by much.
                let gain = if of.contains("q_") || of.contains("kv_a") { 2.0 } else { 1.0 };
                add(name(of), &[outputs, inputs], gain * of_inputs(inputs), 0.0);
            };
            if low_rank_queries {
                matrix("self_attn.q_a_proj", Q_RANK, HIDDEN);
                matrix("self_attn.q_b_proj", HEADS * (NOPE + ROPE), Q_RANK);
            } else {
                matrix("self_attn.q_proj", HEADS * (NOPE + ROPE), HIDDEN);
            }
            matrix("self_attn.kv_a_proj_with_mqa", LATENT + ROPE, HIDDEN);
            matrix("self_attn.kv_b_proj", HEADS * (NOPE + VALUE), LATENT);
            matrix("self_attn.o_proj", HIDDEN, HEADS * VALUE);
            matrix("mlp.gate_proj", FEED, HIDDEN);
            matrix("mlp.up_proj", FEED, HIDDEN);
            matrix("mlp.down_proj", HIDDEN, FEED);
            for (norm, dims) in [
                ("input_layernorm", HIDDEN),
                ("post_attention_layernorm", HIDDEN),
                ("self_attn.kv_a_layernorm", LATENT),
                ("self_attn.q_a_layernorm", Q_RANK),
            ] {
                add(name(norm), &[dims], 0.3, 1.0);
            }
        }
        Self { weights, low_rank_queries }
    }

    /// candle's model with the same weights.
    pub(crate) fn candle(&self) -> DeepSeekV2 {
        let rank = if self.low_rank_queries { Q_RANK.to_string() } else { "null".into() };
        let config = format!(
            r#"{{"vocab_size": {VOCABULARY}, "hidden_size": {HIDDEN}, "intermediate_size": {FEED},
            "moe_intermediate_size": {FEED}, "num_hidden_layers": {LAYERS}, "num_attention_heads": {HEADS},
            "max_position_embeddings": {CONTEXT}, "rms_norm_eps": {EPSILON}, "rope_theta": {BASE},
            "attention_bias": false, "q_lora_rank": {rank}, "qk_rope_head_dim": {ROPE}, "kv_lora_rank": {LATENT},
            "v_head_dim": {VALUE}, "qk_nope_head_dim": {NOPE}, "n_group": 1, "topk_group": 1}}"#
        );
        let config: DeepSeekV2Config = serde_json::from_str(&config).unwrap();
        let builder = VarBuilder::from_tensors(self.weights.clone(), DType::F32, &Device::Cpu);
        DeepSeekV2::new(&config, builder).unwrap()
    }

    /// The logits of a step's wanted rows, `(rows, vocabulary)`.
    pub(crate) fn forward(&self, step: &Step<'_>) -> Result<Tensor> {
        let embedding = self.weight("model.embed_tokens");
        let mut x = embedding.index_select(&step.token_ids()?, 0)?;
        let (cos, sin) = rotations(&step.positions()?)?;
        for layer in 0..LAYERS {
            let name = |name: &str| format!("model.layers.{layer}.{name}");
            let product = |x: &Tensor, of: &str| x.matmul(&self.weight(&name(of)).t()?);
            let norm = |x: &Tensor, of: &str| ops::rms_norm(&x.contiguous()?, self.weight(&name(of)), EPSILON);
            let rotate = |x: &Tensor| {
                let (rows, heads, dims) = x.dims3()?;
                let x = x.reshape((rows, heads, 1, dims))?.contiguous()?;
                rotary_emb::rope_i(&x, &cos, &sin)?.reshape((rows, heads, dims))
            };
            let y = norm(&x, "input_layernorm")?;
            let q = match self.low_rank_queries {
                true => product(
                    &norm(&product(&y, "self_attn.q_a_proj")?, "self_attn.q_a_layernorm")?,
                    "self_attn.q_b_proj",
                )?,
                false => product(&y, "self_attn.q_proj")?,
            };
            let q = q.reshape((q.dim(0)?, HEADS, NOPE + ROPE))?;
            let latent = product(&y, "self_attn.kv_a_proj_with_mqa")?;
            let normed = norm(&latent.narrow(1, 0, LATENT)?, "self_attn.kv_a_layernorm")?.unsqueeze(1)?;
            let k_rope = rotate(&latent.narrow(1, LATENT, ROPE)?.unsqueeze(1)?)?;

            // (heads, nope and value, latent): what makes keys and values of latents.
            let up = self.weight(&name("self_attn.kv_b_proj")).reshape((HEADS, NOPE + VALUE, LATENT))?;
            let absorbed =
                q.narrow(2, 0, NOPE)?.transpose(0, 1)?.contiguous()?.matmul(&up.narrow(1, 0, NOPE)?.contiguous()?)?;
            let q = Tensor::cat(&[absorbed.transpose(0, 1)?, rotate(&q.narrow(2, NOPE, ROPE)?)?], 2)?;
            let k = Tensor::cat(&[normed, k_rope], 2)?;
            let y = step.attend(layer, &q, &k, None, &Attention::scaled_by(NOPE + ROPE))?; // (tokens, heads, latent)
            let values =
                y.transpose(0, 1)?.contiguous()?.matmul(&up.narrow(1, NOPE, VALUE)?.transpose(1, 2)?.contiguous()?)?;
            let y = values.transpose(0, 1)?.flatten_from(1)?;
            x = (x + product(&y, "self_attn.o_proj")?)?;

            let y = norm(&x, "post_attention_layernorm")?;
            let gated = (ops::silu(&product(&y, "mlp.gate_proj")?)? * product(&y, "mlp.up_proj")?)?;
            x = (x + product(&gated, "mlp.down_proj")?)?;
        }
        let x = x.index_select(&step.logits_rows()?, 0)?;
        ops::rms_norm(&x, self.weight("model.norm"), EPSILON)?.matmul(&self.weight("lm_head").t()?)
    }

    fn weight(&self, name: &str) -> &Tensor {
        &self.weights[&format!("{name}.weight")]
    }
}

/// The cosines and sines of each row's position, `(rows, 1, rope / 2)`.
fn rotations(positions: &Tensor) -> Result<(Tensor, Tensor)> {
    let frequencies: Vec<f32> = (0..ROPE).step_by(2).map(|i| BASE.powf(-(i as f32) / ROPE as f32)).collect();
    let frequencies = Tensor::from_vec(frequencies, (1, ROPE / 2), &Device::Cpu)?;
    let angles = positions.to_dtype(DType::F32)?.unsqueeze(D::Minus1)?.matmul(&frequencies)?.unsqueeze(1)?;
    Ok((angles.cos()?, angles.sin()?))
}
