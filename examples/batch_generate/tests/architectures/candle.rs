//! candle's own models of the same weights, one sequence each, fed token by token.

use std::collections::HashMap;
use std::io::Cursor;

use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::{GgmlDType, gguf_file};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{
    gemma3, quantized_llama, quantized_phi3, quantized_qwen2, quantized_qwen3, qwen3_moe,
};

use crate::files::{ModelFile, VOCABULARY};
use crate::naive::Spec;

/// The logits after a token at a position.
pub(crate) type Candle = Box<dyn FnMut(u32, usize) -> Vec<f32>>;

fn one_by_one(mut forward: impl FnMut(&Tensor, usize) -> Result<Tensor> + 'static) -> Candle {
    Box::new(move |token, position| {
        let row = Tensor::new(&[[token]], &Device::Cpu).unwrap();
        forward(&row, position).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    })
}

/// candle's model for quantized files, from the very file.
pub(crate) fn quantized(spec: &Spec, file: &ModelFile) -> Candle {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut file = file.clone();
    // Without this, Qwen 3 rotates in f16.
    file.key("general.dtype", gguf_file::Value::U32(0));
    file.write(&path, GgmlDType::F32);
    let mut file = Cursor::new(std::fs::read(path).unwrap());
    let (content, device) = (Content::read(&mut file).unwrap(), Device::Cpu);
    match spec.architecture {
        "llama" => {
            let mut model = quantized_llama::ModelWeights::from_gguf(content, &mut file, &device).unwrap();
            one_by_one(move |row, position| model.forward(row, position))
        }
        "qwen2" => {
            let mut model = quantized_qwen2::ModelWeights::from_gguf(content, &mut file, &device).unwrap();
            one_by_one(move |row, position| model.forward(row, position))
        }
        "qwen3" => {
            let mut model = quantized_qwen3::ModelWeights::from_gguf(content, &mut file, &device).unwrap();
            one_by_one(move |row, position| model.forward(row, position))
        }
        "phi3" => {
            let mut model = quantized_phi3::ModelWeights::from_gguf(false, content, &mut file, &device).unwrap();
            one_by_one(move |row, position| model.forward(row, position))
        }
        other => panic!("candle computes {other} in another way"),
    }
}

/// candle's Qwen 3 with experts. (Its model for quantized files runs on CUDA only.)
pub(crate) fn qwen3_moe(spec: &Spec, file: &ModelFile) -> Candle {
    let (experts, used) = spec.experts.unwrap();
    let config = qwen3_moe::Config {
        vocab_size: VOCABULARY,
        hidden_size: spec.width,
        intermediate_size: spec.feed_forward,
        num_hidden_layers: spec.windows.len(),
        num_attention_heads: spec.heads,
        head_dim: spec.head_dim,
        attention_bias: false,
        num_key_value_heads: spec.kv_heads,
        max_position_embeddings: spec.context,
        sliding_window: None,
        max_window_layers: 0,
        tie_word_embeddings: spec.tied,
        rope_theta: 10_000.0,
        rms_norm_eps: spec.eps,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
        decoder_sparse_step: 1,
        moe_intermediate_size: spec.feed_forward,
        num_experts_per_tok: used,
        num_experts: experts,
        norm_topk_prob: true,
    };
    let mut model = qwen3_moe::ModelForCausalLM::new(&config, builder(file, &[], 0.0)).unwrap();
    one_by_one(move |row, position| model.forward(row, position))
}

/// candle's Gemma 3, fed token by token: then its cache of `sliding_window` tokens has the right window. (Its model for
/// quantized files has the activation of Llama.)
pub(crate) fn gemma3(spec: &Spec, file: &ModelFile, bases: [f64; 2]) -> Candle {
    let config = gemma3::Config {
        attention_bias: false,
        head_dim: spec.head_dim,
        hidden_activation: Activation::GeluPytorchTanh,
        hidden_size: spec.width,
        intermediate_size: spec.feed_forward,
        num_attention_heads: spec.heads,
        num_hidden_layers: spec.windows.len(),
        num_key_value_heads: spec.kv_heads,
        rms_norm_eps: spec.eps,
        rope_theta: bases[0],
        rope_local_base_freq: bases[1],
        vocab_size: VOCABULARY,
        final_logit_softcapping: None,
        attn_logit_softcapping: None,
        query_pre_attn_scalar: spec.head_dim,
        sliding_window: spec.windows[0].unwrap(),
        sliding_window_pattern: 6,
        max_position_embeddings: spec.context,
    };
    let names = [
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ];
    // candle adds one to the weights of all norms; converters of GGUF files have done so.
    let mut model = gemma3::Model::new(false, &config, builder(file, &names, 1.0)).unwrap();
    one_by_one(move |row, position| model.forward(row, position))
}

/// The weights under the names of `safetensors` files, with experts apart, and norms less `less`.
fn builder(file: &ModelFile, own: &[(&str, &str)], less: f64) -> VarBuilder<'static> {
    const NAMES: [(&str, &str); 15] = [
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("ffn_gate_inp", "mlp.gate"),
        ("ffn_gate_exps", "mlp.experts.#.gate_proj"),
        ("ffn_up_exps", "mlp.experts.#.up_proj"),
        ("ffn_down_exps", "mlp.experts.#.down_proj"),
    ];
    let mut all = HashMap::new();
    for (name, tensor) in &file.tensors {
        let tensor = if name.ends_with("norm.weight") { (tensor - less).unwrap() } else { tensor.clone() };
        let name = match name.split('.').collect::<Vec<_>>()[..] {
            ["token_embd", _] => "model.embed_tokens.weight".to_owned(),
            ["output_norm", _] => "model.norm.weight".to_owned(),
            ["output", _] => "lm_head.weight".to_owned(),
            ["blk", layer, part, kind] => {
                let (_, name) = own.iter().chain(&NAMES).find(|(own, _)| *own == part).unwrap();
                format!("model.layers.{layer}.{name}.{kind}")
            }
            _ => panic!("{name}"),
        };
        if name.contains('#') {
            for expert in 0..tensor.dim(0).unwrap() {
                all.insert(name.replace('#', &expert.to_string()), tensor.get(expert).unwrap());
            }
        } else {
            all.insert(name, tensor);
        }
    }
    VarBuilder::from_tensors(all, DType::F32, &Device::Cpu)
}
