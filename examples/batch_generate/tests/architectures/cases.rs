//! The models. Windows are shorter than the prompts.

use candle_core::quantized::gguf_file::Value;
use candle_core::{Device, Tensor};

use crate::candle;
use crate::files::ModelFile;
use crate::machine::check;
use crate::naive::Spec;
use crate::rotary::Rotary;

const QKV: &[&str] = &["attn_q", "attn_k", "attn_v"];

fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

#[test]
fn llama() {
    let spec = Spec::llama(3);
    let file = ModelFile::random(&spec, 1);
    check(&spec, &file, || Some(candle::quantized(&spec, &file)));
}

/// Llama 3.1 divides frequencies by a tensor; all matrices have biases, and the output matrix is its own.
#[test]
fn llama_with_factors_and_biases() {
    let factors = [1.0f32, 1.5, 4.0, 8.0];
    let rotary = Rotary::plain(8, 500_000.0).divided(&factors, 1.0);
    let spec = Spec {
        biases: &["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"],
        rotary: [rotary.clone(), rotary],
        tied: false,
        ..Spec::llama(3)
    };
    let mut file = ModelFile::random(&spec, 2);
    file.own_key("rope.freq_base", Value::F32(500_000.0));
    file.tensors.insert("rope_freqs.weight".into(), Tensor::new(&factors, &Device::Cpu).unwrap());
    check(&spec, &file, || None);
}

/// Mistral 7B: a llama whose layers all have a window. Positions are divided by 2.
#[test]
fn mistral() {
    let rotary = Rotary::plain(8, 10_000.0).linear(2.0);
    for architecture in ["llama", "mistral"] {
        let spec = Spec {
            architecture,
            windows: vec![Some(9); 3],
            rotary: [rotary.clone(), rotary.clone()],
            ..Spec::llama(3)
        };
        let mut file = ModelFile::random(&spec, 3);
        file.own_key("attention.sliding_window", Value::U32(9));
        file.own_key("rope.scaling.type", text("linear"));
        file.own_key("rope.scaling.factor", Value::F32(2.0));
        check(&spec, &file, || None);
    }
}

pub(crate) fn qwen2() -> Spec {
    Spec { architecture: "qwen2", halves: true, biases: QKV, ..Spec::llama(3) }
}

#[test]
fn qwen_2() {
    let spec = qwen2();
    let file = ModelFile::random(&spec, 4);
    check(&spec, &file, || Some(candle::quantized(&spec, &file)));
}

#[test]
fn qwen_2_with_yarn() {
    // Wide enough for fast, slow and mixed pairs within 64 tokens of training.
    let rotary = Rotary::plain(16, 1_000.0).yarn(1_000.0, 4.0, 64.0);
    let spec = Spec { head_dim: 16, rotated: 16, score_scale: 0.25, rotary: [rotary.clone(), rotary], ..qwen2() };
    let mut file = ModelFile::random(&spec, 5);
    file.own_key("rope.freq_base", Value::F32(1_000.0));
    file.own_key("rope.scaling.type", text("yarn"));
    file.own_key("rope.scaling.factor", Value::F32(4.0));
    file.own_key("rope.scaling.original_context_length", Value::U32(64));
    check(&spec, &file, || None);
}

/// Its heads are wider than its width by their number.
pub(crate) fn qwen3() -> Spec {
    let rotary = Rotary::plain(16, 10_000.0);
    Spec {
        architecture: "qwen3",
        halves: true,
        key_norms: true,
        head_dim: 16,
        rotated: 16,
        score_scale: 0.25,
        rotary: [rotary.clone(), rotary],
        ..Spec::llama(3)
    }
}

#[test]
fn qwen_3() {
    let spec = qwen3();
    let mut file = ModelFile::random(&spec, 6);
    file.own_key("rope.freq_base", Value::F32(10_000.0));
    check(&spec, &file, || Some(candle::quantized(&spec, &file)));
}

pub(crate) fn qwen3moe() -> Spec {
    Spec { architecture: "qwen3moe", experts: Some((6, 2)), feed_forward: 32, tied: false, ..qwen3() }
}

#[test]
fn qwen_3_with_experts() {
    let spec = qwen3moe();
    let mut file = ModelFile::random(&spec, 7);
    // As in real files: that of layers without experts, of which there are none.
    file.own_key("feed_forward_length", Value::U32(192));
    check(&spec, &file, || Some(candle::qwen3_moe(&spec, &file)));
}

/// Every second layer has a window; scores and logits are capped low enough to feel it.
pub(crate) fn gemma2() -> Spec {
    let rotary = Rotary::plain(8, 10_000.0);
    Spec {
        architecture: "gemma2",
        halves: true,
        windows: [Some(11), None].repeat(2),
        rotary: [rotary.clone(), rotary],
        caps: [Some(4.0), Some(1.0)],
        post_norms: true,
        embedding_scale: 32f64.sqrt(),
        gelu: true,
        ..Spec::llama(4)
    }
}

#[test]
fn gemma_2() {
    let spec = gemma2();
    let mut file = ModelFile::random(&spec, 8);
    file.own_key("attention.sliding_window", Value::U32(11));
    file.own_key("attn_logit_softcapping", Value::F32(4.0));
    file.own_key("final_logit_softcapping", Value::F32(1.0));
    check(&spec, &file, || None);
}

/// Scores of the largest model are scaled by `width / heads`, which no key says: it is known by its number of layers.
#[test]
fn the_largest_gemma_2() {
    let rotary = Rotary::plain(16, 10_000.0);
    let spec = Spec {
        architecture: "gemma2",
        head_dim: 16,
        rotated: 16,
        halves: true,
        rotary: [rotary.clone(), rotary],
        windows: [Some(11), None].repeat(23),
        caps: [Some(50.0), Some(30.0)],
        post_norms: true,
        embedding_scale: 32f64.sqrt(),
        gelu: true,
        feed_forward: 32,
        ..Spec::llama(46)
    };
    let mut file = ModelFile::random(&spec, 9);
    // The caps are those of the model, unless the file says otherwise.
    file.own_key("attention.sliding_window", Value::U32(11));
    check(&spec, &file, || None);
}

pub(crate) fn gemma3(rotary: Rotary) -> Spec {
    Spec {
        architecture: "gemma3",
        heads: 3,
        kv_heads: 1,
        head_dim: 32,
        rotated: 32,
        halves: true,
        // Five of six layers have a window, and another base.
        windows: (0..8).map(|layer| (layer % 6 != 5).then_some(7)).collect(),
        rotary: [rotary, Rotary::plain(32, 10_000.0)],
        score_scale: 1.0 / 32f64.sqrt(),
        key_norms: true,
        post_norms: true,
        embedding_scale: 32f64.sqrt(),
        gelu: true,
        ..Spec::llama(8)
    }
}

#[test]
fn gemma_3() {
    let spec = gemma3(Rotary::plain(32, 1_000_000.0));
    let mut file = ModelFile::random(&spec, 10);
    file.own_key("attention.sliding_window", Value::U32(7));
    file.own_key("rope.freq_base", Value::F32(1_000_000.0));
    check(&spec, &file, || Some(candle::gemma3(&spec, &file, [1_000_000.0, 10_000.0])));
}

/// Layers without a window divide positions by 8. candle's model knows no scaling.
#[test]
fn gemma_3_with_scaling() {
    let spec = gemma3(Rotary::plain(32, 1_000_000.0).linear(8.0));
    let mut file = ModelFile::random(&spec, 11);
    file.own_key("attention.sliding_window", Value::U32(7));
    file.own_key("rope.freq_base", Value::F32(1_000_000.0));
    file.own_key("rope.scaling.type", text("linear"));
    file.own_key("rope.scaling.factor", Value::F32(8.0));
    check(&spec, &file, || None);
}

pub(crate) fn phi3() -> Spec {
    Spec { architecture: "phi3", halves: true, fused: true, tied: false, ..Spec::llama(3) }
}

#[test]
fn phi_3() {
    let spec = phi3();
    let file = ModelFile::random(&spec, 12);
    check(&spec, &file, || Some(candle::quantized(&spec, &file)));
}

/// Phi-3 with long contexts: runs with sequences beyond the context of training have other factors than those within.
/// As in Phi-4-mini, a part of each head is rotated, and the output matrix is the embedding.
#[test]
fn phi_3_with_factors_by_length() {
    let (short, long) = ([1.0f32, 1.1, 1.5], [1.0f32, 2.0, 6.0]);
    for (original, factors) in [(4096, &short), (64, &long)] {
        let rotary = Rotary::plain(6, 10_000.0).divided(factors, 1.2);
        let spec = Spec {
            architecture: "phi3",
            halves: true,
            fused: true,
            rotated: 6,
            windows: vec![Some(13); 3],
            rotary: [rotary.clone(), rotary],
            context: 8192,
            ..Spec::llama(3)
        };
        let mut file = ModelFile::random(&spec, 13);
        file.own_key("attention.sliding_window", Value::U32(13));
        file.own_key("rope.scaling.attn_factor", Value::F32(1.2));
        file.own_key("rope.scaling.original_context_length", Value::U32(original));
        for (name, factors) in [("short", short), ("long", long)] {
            let factors = Tensor::new(&factors, &Device::Cpu).unwrap();
            file.tensors.insert(format!("rope_factors_{name}.weight"), factors);
        }
        // The longest sequence of the run decides.
        let spec = Spec { context: 128, ..spec };
        check(&spec, &file, || None);
    }
}
