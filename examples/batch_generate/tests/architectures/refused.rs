//! Files that are damaged, unknown or contradictory, and what the program says of each: one line and exit code 1, never
//! a panic. Those of the tokenizer are beside it.

use std::fs;

use assert_cmd::Command;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use predicates::prelude::*;
use predicates::str::contains;

use crate::cases::{gemma3, phi3, qwen2, qwen3, qwen3moe};
use crate::files::{ModelFile, VOCABULARY};
use crate::naive::Spec;
use crate::rotary::Rotary;

/// A good file, with a tokenizer for letters.
pub(crate) fn good(spec: &Spec) -> ModelFile {
    let mut file = ModelFile::random(spec, 1);
    let tokens = (0..VOCABULARY as u32).filter_map(|i| char::from_u32(33 + i)).map(|c| Value::String(c.to_string()));
    file.key("tokenizer.ggml.model", text("gpt2"));
    file.key("tokenizer.ggml.pre", text("gpt-2"));
    file.key("tokenizer.ggml.tokens", Value::Array(tokens.collect()));
    file.key("tokenizer.ggml.merges", Value::Array(vec![]));
    if spec.windows.iter().any(Option::is_some) {
        file.own_key("attention.sliding_window", Value::U32(7));
    }
    file
}

fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

/// What a file becomes.
enum Change {
    /// A key below the architecture's name, or a whole one.
    Key(&'static str, Value),
    NoKey(&'static str),
    /// A tensor of another shape, or a new one.
    Tensor(&'static str, &'static [usize]),
    NoTensor(&'static str),
    /// The first bytes of the file; of all of them, a part in 1000.
    Cut(usize),
    Bytes(&'static [u8]),
}

use Change::{Bytes, Cut, Key, NoKey, NoTensor};

const GGUF_OF_NO_VERSION: &[u8] = b"GGUF\x09\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

#[test]
fn each_bad_file_has_its_message() {
    let llama = || good(&Spec::llama(2));
    let [qwen2, qwen3, phi3, moe] = [qwen2(), qwen3(), phi3(), qwen3moe()].map(|spec| move || good(&spec));
    let gemma = || good(&gemma3(Rotary::plain(32, 1e6)));
    let own = Change::Tensor;
    let cases: Vec<(&dyn Fn() -> ModelFile, Change, &str)> = vec![
        // Damaged.
        (&llama, Bytes(b""), "is not a GGUF file, or is damaged"),
        (&llama, Bytes(b"GGUF"), "is not a GGUF file, or is damaged"),
        (&llama, Bytes(b"a text, not a model"), "is not a GGUF file, or is damaged"),
        (&llama, Bytes(GGUF_OF_NO_VERSION), "is not a GGUF file, or is damaged"),
        (&llama, Cut(20), "is not a GGUF file, or is damaged"),
        (&llama, Cut(700), "of the model file: it is truncated or damaged"),
        (&llama, Key("general.alignment", Value::U32(24)), "`general.alignment` which is not a power of two"),
        // Unknown.
        (&llama, NoKey("general.architecture"), "the model file has no `general.architecture`"),
        (
            &llama,
            Key("general.architecture", text("gpt-oss")),
            "architecture is `gpt-oss`, only llama, mistral, qwen2,",
        ),
        (
            &llama,
            Key("general.architecture", Value::U32(3)),
            "`general.architecture` in the model file is not a string",
        ),
        (&llama, Key("general.type", text("adapter")), "`general.type` of the model file is `adapter`, only `model`"),
        (&llama, Key("split.count", Value::U16(2)), "`split.count` of the model file is 2, only 0 or 1"),
        (&llama, Key(".attention.twist", Value::F32(1.0)), "keys that are not supported: `llama.attention.twist`"),
        (&llama, Key(".rope.scaling.type", text("ntk")), "`llama.rope.scaling.type` of the model file is `ntk`, only"),
        (
            &llama,
            Key(".attention.temperature_scale", Value::F32(0.1)),
            "`llama.attention.temperature_scale` of the model",
        ),
        (&llama, own("blk.0.attn_sinks.weight", &[4]), "tensors that are not supported: `blk.0.attn_sinks.weight`"),
        (&llama, own("blk.1.attn_q_norm.weight", &[8]), "tensors that are not supported: `blk.1.attn_q_norm.weight`"),
        (
            &moe,
            Key(".expert_gating_func", Value::U32(2)),
            "`qwen3moe.expert_gating_func` of the model file is 2, only 1",
        ),
        (&moe, Key(".expert_shared_count", Value::U32(1)), "`qwen3moe.expert_shared_count` of the model file is 1"),
        (&llama, Key("tokenizer.ggml.model", text("bert")), "the tokenizer model `bert` is not supported"),
        // Incomplete.
        (&llama, NoKey(".context_length"), "the model file has no `llama.context_length`"),
        (&llama, NoTensor("output_norm.weight"), "the model file has no tensor `output_norm.weight`"),
        (&llama, NoKey("tokenizer.ggml.tokens"), "the model file has no `tokenizer.ggml.tokens`"),
        (&qwen2, NoTensor("blk.0.attn_k.bias"), "the model file has no tensor `blk.0.attn_k.bias`"),
        (&qwen3, NoTensor("blk.2.attn_k_norm.weight"), "the model file has no tensor `blk.2.attn_k_norm.weight`"),
        (&gemma, NoTensor("blk.7.post_ffw_norm.weight"), "the model file has no tensor `blk.7.post_ffw_norm.weight`"),
        (&moe, NoKey(".expert_used_count"), "the model file has no `qwen3moe.expert_used_count`"),
        (&phi3, Key(".rope.scaling.type", text("longrope")), "which needs `rope_factors_long.weight` and"),
        (&phi3, own("rope_factors_long.weight", &[4]), "which needs `rope_factors_long.weight` and"),
        // Contradictory.
        (&llama, own("blk.0.attn_q.bias", &[32]), "the model file has no tensor `blk.1.attn_q.bias`"),
        (
            &llama,
            own("rope_freqs.weight", &[3]),
            "`rope_freqs.weight` of the model file has the shape [3], the model needs [4]",
        ),
        (&llama, own("blk.1.ffn_down.weight", &[64, 32]), "has the shape [64, 32], the model needs [32, 64]"),
        (&llama, Key(".attention.head_count_kv", Value::U32(3)), "contradicts itself: width 32, 4 heads, 3 key heads"),
        (&llama, Key(".attention.key_length", Value::U32(7)), "has a width of 7, which cannot be rotated in pairs"),
        (
            &llama,
            Key(".attention.value_length", Value::U32(4)),
            "`llama.attention.value_length` of the model file is 4",
        ),
        (&llama, Key(".rope.dimension_count", Value::U32(12)), "is 12: that many of 8 dimensions cannot be rotated"),
        (&llama, Key(".vocab_size", Value::U32(95)), "`llama.vocab_size` of the model file is 95, only 96"),
        (&llama, Key("tokenizer.ggml.tokens", Value::Array(vec![text("a")])), "has 1 tokens, the model's embedding 96"),
        (&phi3, own("blk.0.ffn_up.weight", &[65, 32]), "`phi3.feed_forward_length` of the model file is 64, only 32"),
        (&moe, Key(".expert_used_count", Value::U32(7)), "each token uses 7 of the model's 6 experts"),
        (&moe, Key(".expert_count", Value::U32(8)), "has the shape [6, 32], the model needs [8, 32]"),
        (&moe, own("blk.0.ffn_gate_exps.weight", &[192, 32]), "has the shape [192, 32], the model needs matrices"),
        (
            &gemma,
            Key(".attention.sliding_window_pattern", Value::Array(vec![Value::Bool(true)])),
            "not a list of 8 flags",
        ),
        // Impossible.
        (&llama, Key(".context_length", Value::U32(u32::MAX)), "more than 16777216: positions would not be exact"),
        (&llama, Key(".rope.scaling.factor", Value::F32(0.0)), "`llama.rope.scaling.factor` in the model file is 0"),
        (
            &llama,
            Key(".attn_logit_softcapping", Value::F32(-1.0)),
            "`llama.attn_logit_softcapping` in the model file is -1",
        ),
        (&llama, Key(".attention.sliding_window", Value::I32(-4)), "is not a whole number, 0 or more"),
        (
            &gemma,
            Key(".rope.freq_base_swa", Value::F32(f32::NAN)),
            "`gemma3.rope.freq_base_swa` in the model file is NaN",
        ),
    ];
    assert!(cases.len() >= 30);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for (good, change, message) in cases {
        let mut file = good();
        let architecture = match &file.metadata["general.architecture"] {
            Value::String(name) => name.clone(),
            other => panic!("{other:?}"),
        };
        let whole = |key: &str| if key.starts_with('.') { format!("{architecture}{key}") } else { key.to_owned() };
        match &change {
            Key(key, value) => file.key(&whole(key), value.clone()),
            NoKey(key) => drop(file.metadata.remove(&whole(key)).unwrap()),
            Change::Tensor(name, shape) => drop(file.tensors.insert((*name).to_owned(), zeros(shape))),
            NoTensor(name) => drop(file.tensors.remove(*name).unwrap()),
            Cut(_) | Bytes(_) => {}
        }
        file.write(&path, GgmlDType::F32);
        match change {
            Bytes(bytes) => fs::write(&path, bytes).unwrap(),
            Cut(part) => {
                let all = fs::read(&path).unwrap();
                fs::write(&path, &all[..all.len() * part / 1000]).unwrap();
            }
            _ => {}
        }
        let mut command = Command::cargo_bin("batch_generate").unwrap();
        command.arg("--model").arg(&path).args(["--max-tokens", "1", "--prompts", "-"]).write_stdin("abc");
        command.assert().code(1).stderr(contains(message).and(contains("panicked").not()));
    }
    // The files that were changed are good.
    for good in [&llama as &dyn Fn() -> ModelFile, &qwen2, &qwen3, &phi3, &moe, &gemma] {
        good().write(&path, GgmlDType::F32);
        let mut command = Command::cargo_bin("batch_generate").unwrap();
        command.arg("--model").arg(&path).args(["--max-tokens", "1", "--prompts", "-"]).write_stdin("abc");
        command.assert().success();
    }
}
