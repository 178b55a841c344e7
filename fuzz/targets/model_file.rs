//! Model files: any bytes, and any values of known keys. The result is an error or a model, never a panic.
#![no_main]

use std::collections::HashMap;
use std::fs;

use arbitrary::Arbitrary;
use inference::chat::ChatTemplate;
use inference::config::Config;
use inference::model::Gguf;
use inference::tokenizer::Tokenizer;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value, VersionedMagic};
use libfuzzer_sys::fuzz_target;

const ARCHITECTURES: [&str; 8] = ["llama", "mistral", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3"];
const KEYS: [&str; 24] = [
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "block_count",
    "context_length",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.scale",
    "attn_logit_softcapping",
    "expert_count",
    "expert_used_count",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "feed_forward_length",
];
const TOKENIZER: [&str; 14] = [
    "ggml.model",
    "ggml.pre",
    "ggml.tokens",
    "ggml.merges",
    "ggml.token_type",
    "ggml.scores",
    "ggml.bos_token_id",
    "ggml.eos_token_id",
    "ggml.unknown_token_id",
    "ggml.add_bos_token",
    "ggml.add_space_prefix",
    "chat_template",
    "ggml.eot_token_id",
    "ggml.eom_token_id",
];
const TEXTS: [&str; 12] =
    ["gpt2", "llama", "qwen2", "llama-bpe", "tekken", "yarn", "linear", "longrope", "none", "a", "b", "a b"];
const TENSORS: [&str; 12] = [
    "token_embd.weight",
    "output_norm.weight",
    "output.weight",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
    "blk.0.attn_q.weight",
    "blk.0.attn_q.bias",
    "blk.0.ffn_gate.weight",
    "blk.0.ffn_up.weight",
    "blk.0.ffn_gate_exps.weight",
    "blk.0.attn_qkv.weight",
];

#[derive(Debug, Arbitrary)]
enum Input {
    Bytes(Vec<u8>),
    Parts { architecture: u8, keys: Vec<(u8, Any)>, tokenizer: Vec<(u8, Any)>, tensors: Vec<(u8, Vec<u16>)> },
}

#[derive(Debug, Arbitrary)]
enum Any {
    Number(i64),
    Small(u8),
    Float(f32),
    Flag(bool),
    Known(u8),
    Text(String),
    Texts(Vec<String>),
    Letters(u8),
    Numbers(Vec<u8>),
    Floats(Vec<f32>),
}

impl Any {
    fn value(&self) -> Value {
        match self {
            Self::Number(number) => Value::I64(*number),
            Self::Small(number) => Value::U32((*number).into()),
            Self::Float(number) => Value::F32(*number),
            Self::Flag(flag) => Value::Bool(*flag),
            Self::Known(index) => Value::String(TEXTS[usize::from(*index) % TEXTS.len()].to_owned()),
            Self::Text(text) => Value::String(text.clone()),
            Self::Texts(texts) => Value::Array(texts.iter().cloned().map(Value::String).collect()),
            Self::Letters(n) => Value::Array((0..*n).map(|i| Value::String(char::from(i).to_string())).collect()),
            Self::Numbers(numbers) => Value::Array(numbers.iter().map(|n| Value::I32((*n).into())).collect()),
            Self::Floats(numbers) => Value::Array(numbers.iter().map(|n| Value::F32(*n)).collect()),
        }
    }
}

fuzz_target!(|input: Input| run(&input));

fn run(input: &Input) {
    match input {
        Input::Bytes(bytes) => {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), bytes).unwrap();
            if let Ok(gguf) = Gguf::open(file.path()) {
                read_text(&gguf.content);
            }
        }
        Input::Parts { architecture, keys, tokenizer, tensors } => {
            let architecture = ARCHITECTURES[usize::from(*architecture) % ARCHITECTURES.len()];
            let mut metadata: HashMap<String, Value> =
                [("general.architecture".to_owned(), Value::String(architecture.to_owned()))].into();
            let own = |key: &u8| format!("{architecture}.{}", KEYS[usize::from(*key) % KEYS.len()]);
            metadata.extend(keys.iter().map(|(key, value)| (own(key), value.value())));
            let of_text = |key: &u8| format!("tokenizer.{}", TOKENIZER[usize::from(*key) % TOKENIZER.len()]);
            metadata.extend(tokenizer.iter().map(|(key, value)| (of_text(key), value.value())));
            let tensor_infos = tensors.iter().map(|(name, shape)| {
                let shape: Vec<usize> = shape.iter().take(4).map(|n| usize::from(*n)).collect();
                let info = TensorInfo { ggml_dtype: GgmlDType::F32, shape: shape.into(), offset: 0 };
                (TENSORS[usize::from(*name) % TENSORS.len()].to_owned(), info)
            });
            let tensor_infos = tensor_infos.collect();
            let content = Content { magic: VersionedMagic::GgufV3, metadata, tensor_infos, tensor_data_offset: 0 };
            let _ = Config::of(&content);
            read_text(&content);
        }
    }
}

fn read_text(content: &Content) {
    let (Ok(tokenizer), Ok(template)) = (Tokenizer::from_gguf(content), ChatTemplate::from_gguf(content)) else {
        return;
    };
    let text = "ab ▁é\0<s>\u{fdd0}";
    if let Ok(ids) = tokenizer.encode(text) {
        assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
        let mut stream = tokenizer.stream();
        let pieces: String = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        assert_eq!(pieces + &stream.finish().unwrap(), tokenizer.decode(&ids).unwrap());
    }
    let _ = tokenizer.encode_user(&template, text, None);
}
