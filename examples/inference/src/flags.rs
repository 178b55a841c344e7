//! The command-line arguments that all programs have.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::weights;

/// Which model, and how its weights are kept.
#[derive(Debug, Clone, Args)]
pub struct ModelFlags {
    /// A GGUF file: llama, mistral, qwen2, qwen3, qwen3moe, gemma2, gemma3 or phi3 [default: SmolLM2-135M-Instruct,
    /// downloaded once]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,

    /// How the model's weights are kept in memory
    #[arg(long, value_name = "HOW", value_enum, default_value_t = Weights::Auto)]
    pub weights: Weights,
}

/// The pool of blocks, and what is below it.
#[derive(Debug, Clone, Args)]
pub struct CacheFlags {
    /// Number of blocks in the pool
    #[arg(long, value_name = "N", default_value_t = 256, conflicts_with = "memory")]
    pub blocks: usize,

    /// Make as many blocks as fit into this much memory: 64MiB, 1.5GiB, 100000000
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub memory: Option<usize>,

    /// Tokens per block
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub block_size: usize,

    /// The type of the stored keys and values
    #[arg(long, value_name = "TYPE", value_enum, default_value_t = KvDtype::F32)]
    pub kv_dtype: KvDtype,

    /// A file for the keys and values of prompts and answers: what another run has computed is read from there
    #[arg(long, value_name = "FILE")]
    pub prefix_cache: Option<PathBuf>,

    /// The most that the file of --prefix-cache may take: 500MiB, 20GiB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "4GiB", requires = "prefix_cache")]
    pub prefix_cache_size: usize,
}

/// How the weights of a quantized file can be kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Weights {
    /// The fastest of the others on this processor: it is measured; exact with --verify
    Auto,
    /// Converted to 32-bit floating point: four to eight times the memory
    #[value(alias = "f32")]
    Exact,
    /// Converted to 8 bits, with activations rounded to 8 bits for each product
    Int8,
    /// As in the file, with activations rounded to 8 bits for each product
    Stored,
}

impl Weights {
    /// The kind of weights, unless it is to be measured.
    pub fn fixed(self) -> Option<weights::Weights> {
        match self {
            Self::Auto => None,
            Self::Exact => Some(weights::Weights::F32),
            Self::Int8 => Some(weights::Weights::Int8),
            Self::Stored => Some(weights::Weights::Stored),
        }
    }
}

/// The types in which keys and values can be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvDtype {
    /// 32-bit floating point
    F32,
    /// 16-bit floating point, 11 bits of precision
    F16,
    /// 16-bit floating point, 8 bits of precision
    Bf16,
    /// 8 bits, with a scale for each token and head
    Int8,
}

impl From<KvDtype> for paged_attention::KvDtype {
    fn from(dtype: KvDtype) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32,
            KvDtype::F16 => Self::F16,
            KvDtype::Bf16 => Self::Bf16,
            KvDtype::Int8 => Self::Int8,
        }
    }
}

/// A number of bytes, with or without a unit.
///
/// # Errors
///
/// If it is no positive number, or too large.
pub fn parse_bytes(text: &str) -> Result<usize, String> {
    const UNITS: [(&str, f64); 7] = [
        ("KiB", 1024.0),
        ("MiB", 1_048_576.0),
        ("GiB", 1_073_741_824.0),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("B", 1.0),
    ];
    let unit = UNITS.iter().find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, *scale)));
    let (number, scale) = unit.unwrap_or((text, 1.0));
    match number.trim().parse::<f64>() {
        Ok(number) if number > 0.0 && number * scale < i64::MAX as f64 => Ok((number * scale) as usize),
        _ => Err("expected a positive number of bytes, like 64MiB, 1.5GiB or 100000000".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_units() {
        assert_eq!(parse_bytes("1.5GiB"), Ok(1_610_612_736));
        assert_eq!(parse_bytes("64 MB"), Ok(64_000_000));
        assert_eq!(parse_bytes("123"), Ok(123));
        for wrong in ["", "0", "-1MiB", "much", "1e30GiB", "NaN"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }
}
