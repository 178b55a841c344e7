//! One request of a workload, and the traces that requests are read from.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::{azure, mooncake};

/// Tokens that share one id in [`Request::prefix`].
pub(crate) const PREFIX_BLOCK: usize = 512;

/// What somebody wants computed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Request {
    /// Its place in the workload.
    pub(crate) number: u32,
    /// Seconds after the first.
    pub(crate) arrival: f64,
    /// Tokens of its prompt, at least 1.
    pub(crate) input: usize,
    /// Tokens that will be generated, at least 1.
    pub(crate) output: usize,
    /// One id for each 512 tokens of the prompt, the last of them perhaps fewer: the same id, the same tokens, and the
    /// same ones before. Empty where nothing is known; then the prompt has nothing in common with any other.
    pub(crate) prefix: Vec<u32>,
}

impl Request {
    /// How many tokens are stored at the end: the last one that is generated is never read.
    pub(crate) fn total(&self) -> usize {
        self.input + self.output - 1
    }

    /// The token at `position`: the same one wherever the prompts are the same, and nowhere else.
    #[inline]
    pub(crate) fn token(&self, position: usize) -> u32 {
        const OWN: u32 = 1 << 31;
        match self.prefix.get(position / PREFIX_BLOCK).filter(|_| position < self.input) {
            Some(&id) => (id * PREFIX_BLOCK as u32 + (position % PREFIX_BLOCK) as u32) & !OWN,
            // An odd factor: no two requests begin with the same token.
            None => OWN | self.number.wrapping_mul(0x9E37_79B1).wrapping_add(position as u32),
        }
    }
}

/// Reads a trace by the ending of its name: `csv` as the Azure LLM inference traces have it, `jsonl` as Mooncake's.
///
/// # Errors
///
/// If the file cannot be read, is of neither kind, or holds no requests; names the line that is wrong.
pub(crate) fn read_trace(file: &Path) -> Result<Vec<Request>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read the trace {}", file.display()))?;
    let kind = file.extension().and_then(|kind| kind.to_str());
    let requests = match kind {
        Some("csv") => azure::parse(&text),
        Some("jsonl") => mooncake::parse(&text),
        _ => bail!("{}: a trace is a .csv of the Azure traces or a .jsonl of Mooncake's", file.display()),
    };
    let requests = requests.with_context(|| format!("in the trace {}", file.display()))?;
    ensure!(!requests.is_empty(), "{} holds no requests", file.display());
    Ok(requests)
}
