//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Compares the paged KV cache with PyTorch, vLLM, ggml, llama.cpp, candle and kvbm-logical, which take turns on this
/// machine in one run. Peers in Python are installed with pip into a virtual environment below `target`; a peer that
/// cannot be installed is skipped.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Args {
    /// Measure only these parts
    #[arg(long, value_name = "PART", value_enum, value_delimiter = ',')]
    pub only: Vec<Part>,

    /// Measure fewer cases, in fewer rounds
    #[arg(long)]
    pub quick: bool,

    /// Smoke test: run everything briefly without Python; the numbers mean nothing
    #[arg(long, conflicts_with = "quick")]
    pub test: bool,

    /// Threads of every contender [default: as many as can run at once here]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,

    /// A GGUF file of the llama architecture for `generation` [default: SmolLM2-135M-Instruct, downloaded once]
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,

    /// Print the tables as Markdown
    #[arg(long)]
    pub markdown: bool,

    /// Write the tables as Markdown into this file, between the lines `<!-- tables -->` and `<!-- end of tables -->`
    #[arg(long, value_name = "FILE")]
    pub into: Option<PathBuf>,

    /// Measure nothing; print the tables of an earlier record
    #[arg(long, value_name = "FILE", conflicts_with_all = ["only", "quick", "test", "threads", "model"])]
    pub from: Option<PathBuf>,
}

/// A part of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Attention of one new token for each sequence
    Decode,
    /// The same for sequences that begin with the same tokens
    Shared,
    /// Causal attention of a whole prompt
    Prefill,
    /// Appending a token's keys and values to a cache
    Append,
    /// Allocating, matching, caching and freeing blocks
    Allocation,
    /// A real model, tokens per second
    Generation,
}

impl Part {
    /// All of them, in the order in which they run.
    pub const ALL: [Self; 6] =
        [Self::Decode, Self::Shared, Self::Prefill, Self::Append, Self::Allocation, Self::Generation];
}

impl Args {
    /// Whether `part` is selected.
    pub fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    /// How thorough the run is.
    pub fn effort(&self) -> Effort {
        match (self.test, self.quick) {
            (true, _) => Effort::Smoke,
            (_, true) => Effort::Quick,
            _ => Effort::Full,
        }
    }
}

/// How thorough a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// A smoke test.
    Smoke,
    /// Few cases and rounds.
    Quick,
    /// Everything.
    Full,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn arguments_are_parsed_and_wrong_ones_refused() {
        Args::command().debug_assert();
        let args = Args::try_parse_from(["peers", "--only", "decode,append", "--quick"]).unwrap();
        assert!(args.wants(Part::Append) && !args.wants(Part::Generation) && args.effort() == Effort::Quick);
        for wrong in [&["--only", "encode"][..], &["--threads", "0"], &["--quick", "--test"], &["--fast"], &["x"]] {
            assert!(Args::try_parse_from([&["peers"][..], wrong].concat()).is_err(), "{wrong:?}");
        }
    }
}
