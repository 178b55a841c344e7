//! Which keys and tensors of a model's file are used. A file has more keys than are read here, and some of them change
//! the model's numbers or tokens. Each of these is either used, or has the one value that changes nothing, or is
//! refused by name.

use std::collections::{BTreeSet, HashMap};

use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file::{Content, Value};

use crate::config::Config;
use crate::metadata::{Metadata, integer};
use crate::shown::line;

/// How a key of the metadata is treated.
#[derive(Clone, Copy)]
enum Rule {
    /// It is read.
    Used,
    /// No value of it changes anything here.
    Ignored,
    /// Other values than these numbers are refused.
    Number(&'static [f64]),
    /// The other value is refused.
    Flag(bool),
    /// Other texts are refused.
    Text(&'static str),
    /// Other values than this number, which the rest of the file gives, are refused.
    EqualTo(fn(&Config) -> usize),
}

use Rule::{EqualTo, Flag, Ignored, Number, Text, Used};

/// The keys below `llama.`.
const LLAMA: &[(&str, Rule)] = &[
    ("attention.head_count", Used),
    ("attention.head_count_kv", Used),
    ("attention.layer_norm_rms_epsilon", Used),
    ("block_count", Used),
    ("context_length", Used),
    ("embedding_length", Used),
    ("rope.freq_base", Used),
    // The rest of the file gives these numbers, too.
    ("attention.key_length", EqualTo(|config| config.head_dim)),
    ("attention.value_length", EqualTo(|config| config.head_dim)),
    ("feed_forward_length", EqualTo(|config| config.feed_forward)),
    ("rope.dimension_count", EqualTo(|config| config.head_dim)),
    ("vocab_size", EqualTo(|config| config.vocabulary)),
    // Which rows of q and k are rotated together: adjacent pairs.
    ("tensor_data_layout", Text("Meta AI original pth")),
    // Scaling of the rotary embedding for longer contexts. The ignored keys matter only if there is scaling.
    ("rope.scale_linear", Number(&[1.0])),
    ("rope.scaling.attn_factor", Number(&[1.0])),
    ("rope.scaling.factor", Number(&[1.0])),
    ("rope.scaling.finetuned", Ignored),
    ("rope.scaling.original_context_length", Ignored),
    ("rope.scaling.type", Text("none")),
    ("rope.scaling.yarn_log_multiplier", Ignored),
    // Experts. The ignored keys matter only if there are experts.
    ("expert_count", Number(&[0.0])),
    ("expert_feed_forward_length", Ignored),
    ("expert_shared_count", Number(&[0.0])),
    ("expert_used_count", Ignored),
    ("leading_dense_block_count", Ignored),
    // Other kinds of attention.
    ("attention.causal", Flag(true)),
    ("attention.clamp_kqv", Number(&[0.0])),
    ("attention.max_alibi_bias", Number(&[0.0])),
    ("attention.sliding_window", Number(&[0.0])),
    ("attn_logit_softcapping", Number(&[0.0])),
    ("final_logit_softcapping", Number(&[0.0])),
    // Scale factors.
    ("embedding_scale", Number(&[1.0])),
    ("logit_scale", Number(&[1.0])),
    ("residual_scale", Number(&[1.0])),
    // For a kind of norm that llama does not have.
    ("attention.layer_norm_epsilon", Ignored),
    // Whether attention and feed-forward read the same input.
    ("use_parallel_residual", Flag(false)),
    // How the rows of a text are pooled into one, for text embeddings.
    ("pooling_type", Number(&[0.0])),
];

/// The keys below `tokenizer.`.
const TOKENIZER: &[(&str, Rule)] = &[
    ("chat_template", Used),
    ("ggml.add_bos_token", Used),
    ("ggml.bos_token_id", Used),
    ("ggml.eom_token_id", Used),
    ("ggml.eos_token_id", Used),
    ("ggml.eot_token_id", Used),
    ("ggml.merges", Used),
    ("ggml.model", Used),
    ("ggml.pre", Used),
    ("ggml.token_type", Used),
    ("ggml.tokens", Used),
    // Tokens added to a text, and changes to its spaces.
    ("ggml.add_eos_token", Flag(false)),
    ("ggml.add_sep_token", Flag(false)),
    ("ggml.add_space_prefix", Flag(false)),
    ("ggml.remove_extra_whitespaces", Flag(false)),
    ("ggml.treat_whitespace_as_suffix", Flag(false)),
    // Byte pairs are merged in the order of the merges; only other kinds of tokenizers use scores.
    ("ggml.scores", Ignored),
    // Every byte is a token, so no text is unknown.
    ("ggml.unknown_token_id", Ignored),
    // For training, for pairs of texts, and for filling in the middle of a text.
    ("ggml.cls_token_id", Ignored),
    ("ggml.mask_token_id", Ignored),
    ("ggml.padding_token_id", Ignored),
    ("ggml.seperator_token_id", Ignored), // llama.cpp's spelling
    ("ggml.separator_token_id", Ignored),
    ("ggml.fim_mid_token_id", Ignored),
    ("ggml.fim_pad_token_id", Ignored),
    ("ggml.fim_pre_token_id", Ignored),
    ("ggml.fim_rep_token_id", Ignored),
    ("ggml.fim_sep_token_id", Ignored),
    ("ggml.fim_suf_token_id", Ignored),
    ("ggml.middle_token_id", Ignored),
    ("ggml.prefix_token_id", Ignored),
    ("ggml.suffix_token_id", Ignored),
    // Other chat templates, and the same tokenizer in another format.
    ("chat_templates", Ignored),
    ("huggingface.json", Ignored),
];

/// The keys outside `llama.` and `tokenizer.` that are checked. All other keys there only describe the file.
const OTHERS: &[(&str, Rule)] = &[
    // Not an adapter: that would have to be added to another model.
    ("general.type", Text("model")),
    // The layout of the numbers in a block of a quantized type.
    ("general.quantization_version", Number(&[2.0])),
    // Not one of several files that make up a model.
    ("split.count", Number(&[0.0, 1.0])),
];

/// Refuses keys and values of the metadata that concern the model's numbers and are not supported.
///
/// # Errors
///
/// If there is such a key or value. The message names it.
pub(crate) fn check_keys(metadata: &Metadata<'_>, config: &Config) -> Result<()> {
    check(metadata, "llama.", LLAMA, Some(config))?;
    for (key, value) in metadata.below("") {
        if let Some(&(_, rule)) = OTHERS.iter().find(|(known, _)| *known == key) {
            rule.check(key, value, None)?;
        }
    }
    Ok(())
}

/// Refuses keys and values of the metadata that concern the tokenizer and are not supported.
///
/// # Errors
///
/// If there is such a key or value. The message names it.
pub(crate) fn check_tokenizer(metadata: &Metadata<'_>) -> Result<()> {
    check(metadata, "tokenizer.", TOKENIZER, None)
}

fn check(metadata: &Metadata<'_>, prefix: &str, rules: &[(&str, Rule)], config: Option<&Config>) -> Result<()> {
    let rules: HashMap<&str, Rule> = rules.iter().copied().collect();
    let mut unknown = Vec::new();
    for (key, value) in metadata.below(prefix) {
        // `tokenizer.chat_template.NAME` is an alternative template, which is used only if it is selected by name.
        let known = if key.starts_with("chat_template.") { Some(&Ignored) } else { rules.get(key) };
        match known {
            Some(rule) => rule.check(&format!("{prefix}{key}"), value, config)?,
            None => unknown.push(format!("{prefix}{key}")),
        }
    }
    ensure!(unknown.is_empty(), "the model file has keys that are not supported: {}", few(&unknown));
    Ok(())
}

impl Rule {
    fn check(self, key: &str, value: &Value, config: Option<&Config>) -> Result<()> {
        let (good, supported) = match self {
            Used | Ignored => return Ok(()),
            Number(wanted) => (
                number(value).is_some_and(|n| wanted.contains(&n)),
                wanted.iter().map(f64::to_string).collect::<Vec<_>>().join(" or "),
            ),
            Flag(wanted) => (matches!(value, Value::Bool(flag) if *flag == wanted), wanted.to_string()),
            Text(wanted) => (matches!(value, Value::String(text) if text == wanted), format!("`{wanted}`")),
            EqualTo(wanted) => {
                let Some(wanted) = config.map(wanted) else { return Ok(()) };
                (integer(value).and_then(|n| usize::try_from(n).ok()) == Some(wanted), wanted.to_string())
            }
        };
        ensure!(good, "`{key}` of the model file is {}, only {supported} is supported", shown(value));
        Ok(())
    }
}

fn number(value: &Value) -> Option<f64> {
    match *value {
        Value::F32(number) => Some(number.into()),
        Value::F64(number) => Some(number),
        _ => integer(value).map(|number| number as f64),
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{}`", line(text)),
        Value::Bool(flag) => flag.to_string(),
        Value::Array(values) => format!("a list of {}", values.len()),
        _ => number(value).map_or_else(|| "another number".to_owned(), |number| number.to_string()),
    }
}

/// The names and shapes of a model's tensors. A matrix has a row for each number of the output.
pub(crate) fn tensors(config: &Config) -> impl Iterator<Item = (String, Vec<usize>)> {
    let Config { layers, width, heads, kv_heads, head_dim, feed_forward, vocabulary, tied, .. } = *config;
    let layer = [
        ("attn_norm", vec![width]),
        ("attn_q", vec![heads * head_dim, width]),
        ("attn_k", vec![kv_heads * head_dim, width]),
        ("attn_v", vec![kv_heads * head_dim, width]),
        ("attn_output", vec![width, heads * head_dim]),
        ("ffn_norm", vec![width]),
        ("ffn_gate", vec![feed_forward, width]),
        ("ffn_up", vec![feed_forward, width]),
        ("ffn_down", vec![width, feed_forward]),
    ];
    let output = (!tied).then(|| ("output".to_owned(), vec![vocabulary, width]));
    [("token_embd".to_owned(), vec![vocabulary, width]), ("output_norm".to_owned(), vec![width])]
        .into_iter()
        .chain(output)
        .chain((0..layers).flat_map(move |i| layer.clone().map(|(name, shape)| (format!("blk.{i}.{name}"), shape))))
        .map(|(name, shape)| (format!("{name}.weight"), shape))
}

/// Checks that the file has the model's tensors with their shapes, and no others.
///
/// # Errors
///
/// If a tensor is missing, has another shape, has 2^48 numbers or more, or is not used. The message names it.
pub(crate) fn check_tensors(content: &Content, config: &Config) -> Result<()> {
    let mut unused: BTreeSet<&str> = content.tensor_infos.keys().map(String::as_str).collect();
    for (name, shape) in tensors(config) {
        let info = content.tensor_infos.get(&name).with_context(|| format!("the model file has no tensor `{name}`"))?;
        ensure!(
            info.shape.dims() == shape,
            "the tensor `{name}` of the model file has the shape {:?}, the model needs {shape:?}",
            info.shape.dims()
        );
        let numbers = shape.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
        ensure!(
            numbers.is_some_and(|n| n < 1 << 48),
            "the tensor `{name}` of the model file has the shape {shape:?}: no file holds that"
        );
        unused.remove(name.as_str());
    }
    let unused: Vec<_> = unused.into_iter().map(str::to_owned).collect();
    ensure!(unused.is_empty(), "the model file has tensors that are not supported: {}", few(&unused));
    Ok(())
}

/// The first few names, and the number of the others.
fn few(names: &[String]) -> String {
    const SHOWN: usize = 3;
    let first: Vec<_> = names.iter().take(SHOWN).map(|name| format!("`{}`", line(name))).collect();
    let more = names.len().saturating_sub(SHOWN);
    first.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{SMALL, add, complaint, small};
    use crate::metadata::tests::content;

    fn with(values: &[(&str, Value)]) -> Content {
        let mut content = small();
        content.metadata.extend(values.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        content
    }

    #[test]
    fn keys_that_change_nothing_are_accepted() {
        let content = with(&[
            ("llama.attention.key_length", Value::U32(8)),
            ("llama.attention.value_length", Value::U32(8)),
            ("llama.feed_forward_length", Value::U32(64)),
            ("llama.rope.dimension_count", Value::U64(8)),
            ("llama.vocab_size", Value::U32(96)),
            ("llama.expert_count", Value::U32(0)),
            ("llama.expert_used_count", Value::U32(0)),
            ("llama.rope.scaling.type", Value::String("none".into())),
            ("llama.rope.scaling.factor", Value::F32(1.0)),
            ("llama.tensor_data_layout", Value::String("Meta AI original pth".into())),
            ("general.type", Value::String("model".into())),
            ("general.quantization_version", Value::U32(2)),
            ("general.name", Value::String("anything".into())),
            ("split.count", Value::U16(0)),
        ]);
        assert_eq!(Config::of(&content).unwrap(), SMALL);
    }

    #[test]
    fn keys_that_change_the_numbers_are_refused_by_name() {
        for (key, value, said) in [
            ("llama.rope.scaling.type", Value::String("yarn".into()), "`yarn`, only `none` is supported"),
            ("llama.rope.scaling.factor", Value::F32(8.0), "8, only 1 is supported"),
            ("llama.rope.scale_linear", Value::F32(2.0), "2, only 1 is supported"),
            ("llama.rope.dimension_count", Value::U32(4), "4, only 8 is supported"),
            ("llama.attention.key_length", Value::U32(16), "16, only 8 is supported"),
            ("llama.attention.value_length", Value::U32(16), "16, only 8 is supported"),
            ("llama.feed_forward_length", Value::Array(vec![Value::U32(64); 2]), "a list of 2, only 64 is supported"),
            ("llama.vocab_size", Value::U32(95), "95, only 96 is supported"),
            ("llama.expert_count", Value::U32(8), "8, only 0 is supported"),
            ("llama.attention.sliding_window", Value::U32(4096), "4096, only 0 is supported"),
            ("llama.attention.causal", Value::Bool(false), "false, only true is supported"),
            ("llama.logit_scale", Value::F32(0.5), "0.5, only 1 is supported"),
            (
                "llama.tensor_data_layout",
                Value::String("other".into()),
                "`other`, only `Meta AI original pth` is supported",
            ),
            ("general.type", Value::String("adapter".into()), "`adapter`, only `model` is supported"),
            ("general.quantization_version", Value::U32(1), "1, only 2 is supported"),
            ("split.count", Value::U16(3), "3, only 0 or 1 is supported"),
        ] {
            assert_eq!(complaint(key, value), format!("`{key}` of the model file is {said}"));
        }
        assert_eq!(
            complaint("llama.attention.twist", Value::F32(1.0)),
            "the model file has keys that are not supported: `llama.attention.twist`"
        );
        let many = ["e", "d", "c", "b", "a"].map(|key| (format!("llama.{key}"), Value::U8(0)));
        let many = many.each_ref().map(|(key, value)| (key.as_str(), value.clone()));
        assert_eq!(
            Config::of(&with(&many)).unwrap_err().to_string(),
            "the model file has keys that are not supported: `llama.a`, `llama.b`, `llama.c` and 2 more"
        );
    }

    #[test]
    fn keys_that_change_the_tokens_are_refused_by_name() {
        let check = |key: &str, value| {
            check_tokenizer(&Metadata::of(&content([(key, value)]))).map_err(|error| error.to_string())
        };
        for key in ["add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces"] {
            let key = format!("tokenizer.ggml.{key}");
            assert_eq!(check(&key, Value::Bool(false)), Ok(()));
            let refused = format!("`{key}` of the model file is true, only false is supported");
            assert_eq!(check(&key, Value::Bool(true)), Err(refused));
        }
        for key in ["tokenizer.chat_template.tool_use", "tokenizer.ggml.padding_token_id"] {
            assert_eq!(check(key, Value::U32(0)), Ok(()));
        }
        assert_eq!(
            check("tokenizer.ggml.precompiled_charsmap", Value::Array(vec![])),
            Err("the model file has keys that are not supported: `tokenizer.ggml.precompiled_charsmap`".to_owned())
        );
    }

    #[test]
    fn tensors_that_are_not_read_are_refused_by_name() {
        let mut content = small();
        add(&mut content, "rope_freqs.weight", &[4]);
        let error = |content: &Content| Config::of(content).unwrap_err().to_string();
        assert_eq!(error(&content), "the model file has tensors that are not supported: `rope_freqs.weight`");
        ["attn_q", "attn_k", "attn_v"].iter().for_each(|part| add(&mut content, &format!("blk.0.{part}.bias"), &[32]));
        assert_eq!(
            error(&content),
            "the model file has tensors that are not supported: `blk.0.attn_k.bias`, `blk.0.attn_q.bias`, \
             `blk.0.attn_v.bias` and 1 more"
        );
    }

    #[test]
    fn tensors_of_other_shapes_are_refused_by_name() {
        let no_matrices: [(&str, &[usize]); 4] = [
            ("token_embd.weight", &[]),
            ("token_embd.weight", &[3072]),
            ("token_embd.weight", &[0, 32]),
            ("blk.0.ffn_gate.weight", &[1]),
        ];
        for (name, shape) in no_matrices {
            let mut content = small();
            add(&mut content, name, shape);
            assert_eq!(
                Config::of(&content).unwrap_err().to_string(),
                format!("the tensor `{name}` of the model file has the shape {shape:?}, which is not a matrix")
            );
        }
        for (name, expected) in tensors(&SMALL) {
            let wrong = [vec![], vec![1], [&expected[..], &[1]].concat(), expected.iter().map(|n| n + 1).collect()];
            for shape in wrong {
                let mut content = small();
                add(&mut content, &name, &shape);
                let error = Config::of(&content).unwrap_err().to_string();
                assert!(
                    error.contains(&format!("tensor `{name}` of the model file has the shape {shape:?}, ")),
                    "{error}"
                );
            }
            let mut content = small();
            content.tensor_infos.remove(&name);
            assert_eq!(Config::of(&content).unwrap_err().to_string(), format!("the model file has no tensor `{name}`"));
        }
        // The number of its numbers does not fit into 64 bits.
        let mut content = small();
        for i in 0..2 {
            add(&mut content, &format!("blk.{i}.ffn_gate.weight"), &[1 << 60, 32]);
        }
        assert!(Config::of(&content).unwrap_err().to_string().contains("no file holds that"));
    }
}
