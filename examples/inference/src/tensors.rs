//! The names and shapes of a model's tensors in its file.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file::Content;

use crate::architecture::Architecture;
use crate::config::{Config, Experts, RopeFactors};
use crate::used::few;

/// Factors of the rotary embedding: for all sequences, for runs with long ones, for other runs.
pub(crate) const ROPE_FACTORS: [&str; 3] =
    ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];

/// The matrices of a layer that can have a bias. Experts have none.
const WITH_BIAS: [&str; 8] =
    ["attn_qkv", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// The matrices whose biases the architecture has, or the first layer of this file.
pub(crate) fn biases(content: &Content, architecture: &Architecture) -> Vec<&'static str> {
    let required = |part: &str| architecture.biases && ["attn_q", "attn_k", "attn_v"].contains(&part);
    let found = |part: &str| content.tensor_infos.contains_key(&format!("blk.0.{part}.bias"));
    WITH_BIAS.into_iter().filter(|part| required(part) || found(part)).collect()
}

/// The names and shapes of a model's tensors. A matrix has a row for each number of the output.
pub(crate) fn all(config: &Config) -> Vec<(String, Vec<usize>)> {
    let Config { width, vocabulary, .. } = *config;
    let mut all = vec![("token_embd.weight".to_owned(), vec![vocabulary, width])];
    all.push(("output_norm.weight".to_owned(), vec![width]));
    if !config.tied {
        all.push(("output.weight".to_owned(), vec![vocabulary, width]));
    }
    let [freqs, long, short] = ROPE_FACTORS.map(|name| (name.to_owned(), vec![config.rope.dims / 2]));
    match config.rope_factors {
        RopeFactors::None => {}
        RopeFactors::Always => all.push(freqs),
        RopeFactors::ByLength { .. } => all.extend([long, short]),
    }
    let layer = layer(config);
    for i in 0..config.layers() {
        all.extend(layer.iter().map(|(name, shape)| (format!("blk.{i}.{name}"), shape.clone())));
    }
    all
}

/// The tensors of one layer.
fn layer(config: &Config) -> Vec<(String, Vec<usize>)> {
    let Config { architecture, width, heads, kv_heads, head_dim, feed_forward, .. } = *config;
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let mut layer = vec![("attn_norm", vec![width]), ("ffn_norm", vec![width])];
    if architecture.fused {
        layer.push(("attn_qkv", vec![q + 2 * kv, width]));
    } else {
        layer.extend([("attn_q", vec![q, width]), ("attn_k", vec![kv, width]), ("attn_v", vec![kv, width])]);
    }
    if architecture.key_norms {
        layer.extend([("attn_q_norm", vec![head_dim]), ("attn_k_norm", vec![head_dim])]);
    }
    if architecture.post_norms {
        layer.extend([("post_attention_norm", vec![width]), ("post_ffw_norm", vec![width])]);
    }
    layer.push(("attn_output", vec![width, q]));
    match config.experts {
        Some(Experts { count, .. }) => layer.extend([
            ("ffn_gate_inp", vec![count, width]),
            ("ffn_gate_exps", vec![count, feed_forward, width]),
            ("ffn_up_exps", vec![count, feed_forward, width]),
            ("ffn_down_exps", vec![count, width, feed_forward]),
        ]),
        None if architecture.fused => {
            layer.extend([("ffn_up", vec![2 * feed_forward, width]), ("ffn_down", vec![width, feed_forward])]);
        }
        None => layer.extend([
            ("ffn_gate", vec![feed_forward, width]),
            ("ffn_up", vec![feed_forward, width]),
            ("ffn_down", vec![width, feed_forward]),
        ]),
    }
    let biased = layer.iter().filter(|(part, _)| config.biases.contains(part));
    let biases: Vec<_> = biased.map(|(part, shape)| (format!("{part}.bias"), shape[..1].to_vec())).collect();
    let weights = layer.into_iter().map(|(part, shape)| (format!("{part}.weight"), shape));
    weights.chain(biases).collect()
}

/// The shape of a tensor of the file.
///
/// # Errors
///
/// If the file does not have it.
pub(crate) fn dims<'a>(content: &'a Content, name: &str) -> Result<&'a [usize]> {
    let info = content.tensor_infos.get(name).with_context(|| format!("the model file has no tensor `{name}`"))?;
    Ok(info.shape.dims())
}

/// Checks that the file has the model's tensors with their shapes, and no others.
///
/// # Errors
///
/// If a tensor is missing, has another shape, has 2^48 numbers or more, or is not used. The message names it.
pub(crate) fn check(content: &Content, config: &Config) -> Result<()> {
    let mut unused: BTreeSet<&str> = content.tensor_infos.keys().map(String::as_str).collect();
    for (name, shape) in all(config) {
        let dims = dims(content, &name)?;
        ensure!(
            dims == shape,
            "the tensor `{name}` of the model file has the shape {dims:?}, the model needs {shape:?}"
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{add, small, small_config};

    #[test]
    fn tensors_that_are_not_read_are_refused_by_name() {
        let mut content = small();
        add(&mut content, "rope_freq.weight", &[4]);
        let error = |content: &Content| Config::of(content).unwrap_err().to_string();
        assert_eq!(error(&content), "the model file has tensors that are not supported: `rope_freq.weight`");
        ["attn_q", "attn_k", "attn_v"].iter().for_each(|part| add(&mut content, &format!("blk.0.{part}.scale"), &[32]));
        assert_eq!(
            error(&content),
            "the model file has tensors that are not supported: `blk.0.attn_k.scale`, `blk.0.attn_q.scale`, \
             `blk.0.attn_v.scale` and 1 more"
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
        for (name, expected) in all(&small_config()) {
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
