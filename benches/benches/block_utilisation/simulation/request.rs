//! The requests of a workload, and reading them from traces.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::{azure, mooncake};

/// Tokens that share one id in [`Request::prefix`].
pub(crate) const PREFIX_BLOCK: usize = 512;

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Request {
    /// Its index in the workload.
    pub(crate) number: u32,
    /// Seconds after the first request.
    pub(crate) arrival: f64,
    /// Tokens of its prompt, at least 1.
    pub(crate) input: usize,
    /// Tokens that will be generated, at least 1.
    pub(crate) output: usize,
    /// One id for each 512 tokens of the prompt; the last may have fewer. Equal ids mean equal tokens, with equal
    /// tokens before them. Empty if the trace has no ids; then the prompt shares no prefix with any other.
    pub(crate) prefix: Vec<u32>,
}

impl Request {
    /// The number of tokens stored at the end: all but the last generated one, which is never read.
    pub(crate) fn total(&self) -> usize {
        self.input + self.output - 1
    }

    /// The token at `position`. At the same position, two requests have the same token exactly if they have the same
    /// prefix id there.
    #[inline]
    pub(crate) fn token(&self, position: usize) -> u32 {
        const OWN: u32 = 1 << 31;
        match self.prefix.get(position / PREFIX_BLOCK).filter(|_| position < self.input) {
            Some(&id) => (id * PREFIX_BLOCK as u32 + (position % PREFIX_BLOCK) as u32) & !OWN,
            // The factor is odd, so no two requests have the same first token.
            None => OWN | self.number.wrapping_mul(0x9E37_79B1).wrapping_add(position as u32),
        }
    }
}

/// Reads a trace; the file name's extension gives the format: `csv` for the Azure LLM inference traces, `jsonl` for
/// Mooncake's.
///
/// # Errors
///
/// If the file cannot be read, has another extension, has a wrong line (which the error names), or has no requests.
pub(crate) fn read_trace(file: &Path) -> Result<Vec<Request>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read the trace {}", file.display()))?;
    let kind = file.extension().and_then(|kind| kind.to_str());
    let requests = match kind {
        Some("csv") => azure::parse(&text),
        Some("jsonl") => mooncake::parse(&text),
        _ => bail!("{}: not a trace, which is a .csv of the Azure traces or a .jsonl of Mooncake's", file.display()),
    };
    let requests = requests.with_context(|| format!("in the trace {}", file.display()))?;
    ensure!(!requests.is_empty(), "the trace {} has no requests", file.display());
    Ok(requests)
}
