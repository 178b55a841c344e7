//! The command-line arguments.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::prompts::Format;
use crate::weights;

/// Answers many prompts at once with a real language model, from one paged KV cache.
#[derive(Debug, Parser)]
#[command(version, allow_negative_numbers = true)]
pub struct Args {
    /// A GGUF file: llama, mistral, qwen2, qwen3, qwen3moe, gemma2, gemma3 or phi3 [default: SmolLM2-135M-Instruct,
    /// downloaded once]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,

    /// How the model's weights are kept in memory
    #[arg(long, value_name = "HOW", value_enum, default_value_t = Weights::Auto)]
    pub weights: Weights,

    /// A file with one prompt per line, or JSON lines like {"prompt": "..", "max_tokens": 32}, or a JSON array of such
    /// objects; - is the standard input [default: eight built-in prompts]
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,

    /// The format of the file of prompts
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Auto, requires = "prompts")]
    pub prompts_format: Format,

    /// The system message of every prompt; computed once, however many prompts there are
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,

    /// Maximum number of tokens to generate for each prompt
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub max_tokens: usize,

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
    #[arg(long, value_name = "FILE", conflicts_with = "measure")]
    pub prefix_cache: Option<PathBuf>,

    /// The most that the file of --prefix-cache may take: 500MiB, 20GiB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "4GiB", requires = "prefix_cache")]
    pub prefix_cache_size: usize,

    /// Maximum number of sequences that run together
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub max_batch: usize,

    /// 0 always takes the most likely token; 1 samples with the model's own probabilities
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f32,

    /// Sample from the most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,

    /// Sample i of a prompt uses the seed SEED + i
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,

    /// Answers per prompt; the prompt is computed and stored once
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub samples: usize,

    /// Also show the blocks of the pool in the step that used most of them
    #[arg(long)]
    pub show_pool: bool,

    /// Also write the results as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Measure decoding and prefill at the given batches and contexts, and nothing else
    #[arg(long, conflicts_with_all = ["prompts", "json"])]
    pub measure: bool,

    /// Batch sizes for --measure: numbers of sequences that decode together
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [8], requires = "measure")]
    pub batch: Vec<usize>,

    /// Contexts for --measure: numbers of tokens that each sequence has in the cache
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [128, 1024, 4096], requires = "measure")]
    pub context: Vec<usize>,

    /// Compute every sequence again, alone, with candle's own model and contiguous cache, and compare token for token
    #[cfg(feature = "verify")]
    #[arg(long)]
    pub verify: bool,

    /// Measure decoding in batches of 1 and 8 and in candle's own loop, and nothing else
    #[cfg(feature = "verify")]
    #[arg(long, conflicts_with_all = ["verify", "measure", "prompts", "json"])]
    pub compare: bool,
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

fn parse_bytes(text: &str) -> Result<usize, String> {
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

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
