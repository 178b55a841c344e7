//! The command-line arguments.

use std::path::PathBuf;

use clap::Parser;
use inference::flags::{CacheFlags, ModelFlags};

use crate::prompts::Format;

/// Answers many prompts at once with a real language model, from one paged KV cache.
#[derive(Debug, Parser)]
#[command(version, allow_negative_numbers = true)]
pub struct Args {
    /// Which model, and how its weights are kept.
    #[command(flatten)]
    pub model: ModelFlags,

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

    /// The pool of blocks, and what is below it.
    #[command(flatten)]
    pub cache: CacheFlags,

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
    #[arg(long, conflicts_with_all = ["prompts", "json", "prefix_cache"])]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
