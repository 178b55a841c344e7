//! Which keys of a model's file are used. A file has more keys than are read here, and some of them change
//! the model's numbers or tokens. Each of these is either used, or has the one value that changes nothing, or is
//! refused by name.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use candle_core::quantized::gguf_file::Value;

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
    /// Other values than this number, which the rest of the file gives, are refused. `None`: it changes nothing.
    EqualTo(fn(&Config) -> Option<usize>),
}

use Rule::{EqualTo, Flag, Ignored, Number, Text, Used};

/// The keys below the name of the architecture.
const MODEL: &[(&str, Rule)] = &[
    ("attention.head_count", Used),
    ("attention.head_count_kv", Used),
    ("attention.key_length", Used),
    ("attention.layer_norm_rms_epsilon", Used),
    ("attention.scale", Used),
    ("attention.sliding_window", Used),
    ("attention.sliding_window_pattern", Used),
    ("attn_logit_softcapping", Used),
    ("block_count", Used),
    ("context_length", Used),
    ("embedding_length", Used),
    ("expert_used_count", Used),
    ("final_logit_softcapping", Used),
    ("rope.dimension_count", Used),
    ("rope.freq_base", Used),
    ("rope.freq_base_swa", Used),
    ("rope.global.freq_base", Used),
    ("rope.local.freq_base", Used),
    ("rope.local_freq_base", Used),
    ("rope.scale_linear", Used),
    ("rope.scaling.attn_factor", Used),
    ("rope.scaling.factor", Used),
    ("rope.scaling.original_context_length", Used),
    ("rope.scaling.type", Used),
    ("rope.scaling.yarn_beta_fast", Used),
    ("rope.scaling.yarn_beta_slow", Used),
    // The rest of the file gives these numbers, too.
    ("attention.value_length", EqualTo(|config| Some(config.head_dim))),
    ("expert_count", EqualTo(|config| Some(config.experts.map_or(0, |experts| experts.count)))),
    ("expert_feed_forward_length", EqualTo(|config| config.experts.map(|_| config.feed_forward))),
    // With experts, it is that of layers without, and there are none.
    ("feed_forward_length", EqualTo(|config| config.experts.is_none().then_some(config.feed_forward))),
    ("vocab_size", EqualTo(|config| Some(config.vocabulary))),
    // Which rows of q and k are rotated together: adjacent pairs.
    ("tensor_data_layout", Text("Meta AI original pth")),
    // More of YaRN.
    ("rope.scaling.finetuned", Ignored),
    ("rope.scaling.yarn_attn_factor", Number(&[1.0])),
    ("rope.scaling.yarn_ext_factor", Number(&[-1.0, 1.0])),
    ("rope.scaling.yarn_log_multiplier", Number(&[0.0])),
    // More of experts: weights by a softmax over all of them, whose sum over those that are used is made 1.
    ("expert_gating_func", Number(&[1.0])),
    ("expert_shared_count", Number(&[0.0])),
    ("expert_shared_feed_forward_length", Number(&[0.0])),
    ("expert_weights_norm", Flag(true)),
    ("expert_weights_scale", Number(&[0.0, 1.0])),
    ("leading_dense_block_count", Number(&[0.0])),
    // Other kinds of attention.
    ("attention.causal", Flag(true)),
    ("attention.clamp_kqv", Number(&[0.0])),
    ("attention.max_alibi_bias", Number(&[0.0])),
    ("attention.temperature_scale", Number(&[0.0])),
    // Scale factors.
    ("embedding_scale", Number(&[1.0])),
    ("logit_scale", Number(&[1.0])),
    ("residual_scale", Number(&[1.0])),
    // For a kind of norm that these models do not have.
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
    ("ggml.add_space_prefix", Used),
    ("ggml.bos_token_id", Used),
    ("ggml.eom_token_id", Used),
    ("ggml.eos_token_id", Used),
    ("ggml.eos_token_ids", Used),
    ("ggml.eot_token_id", Used),
    ("ggml.merges", Used),
    ("ggml.model", Used),
    ("ggml.pre", Used),
    ("ggml.scores", Used),
    ("ggml.token_type", Used),
    ("ggml.tokens", Used),
    ("ggml.unknown_token_id", Used),
    // Tokens added to a text, and changes to its spaces.
    ("ggml.add_eos_token", Flag(false)),
    ("ggml.add_sep_token", Flag(false)),
    ("ggml.remove_extra_whitespaces", Flag(false)),
    ("ggml.treat_whitespace_as_suffix", Flag(false)),
    // For training, for pairs of texts, and for filling in the middle of a text.
    ("ggml.add_cls_token", Ignored),
    ("ggml.add_mask_token", Ignored),
    ("ggml.add_padding_token", Ignored),
    ("ggml.add_unknown_token", Ignored),
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

/// The keys outside these two that are checked. All other keys there only describe the file.
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
    check(metadata, &format!("{}.", config.architecture.name), MODEL, Some(config))?;
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
                let Some(wanted) = config.and_then(wanted) else { return Ok(()) };
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

/// The first few names, and the number of the others.
pub(crate) fn few(names: &[String]) -> String {
    const SHOWN: usize = 3;
    let first: Vec<_> = names.iter().take(SHOWN).map(|name| format!("`{}`", line(name))).collect();
    let more = names.len().saturating_sub(SHOWN);
    first.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::Content;

    use super::*;
    use crate::config::tests::{complaint, small, small_config};
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
        assert_eq!(Config::of(&content).unwrap(), small_config());
    }

    #[test]
    fn keys_that_change_the_numbers_are_refused_by_name() {
        for (key, value, said) in [
            ("llama.rope.scaling.yarn_ext_factor", Value::F32(0.5), "0.5, only -1 or 1 is supported"),
            ("llama.expert_shared_count", Value::U32(1), "1, only 0 is supported"),
            ("llama.attention.value_length", Value::U32(16), "16, only 8 is supported"),
            ("llama.feed_forward_length", Value::Array(vec![Value::U32(64); 2]), "a list of 2, only 64 is supported"),
            ("llama.vocab_size", Value::U32(95), "95, only 96 is supported"),
            ("llama.expert_count", Value::U32(8), "8, only 0 is supported"),
            ("llama.attention.temperature_scale", Value::F32(0.1), "0.10000000149011612, only 0 is supported"),
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
        for key in ["add_eos_token", "add_sep_token", "remove_extra_whitespaces"] {
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
}
