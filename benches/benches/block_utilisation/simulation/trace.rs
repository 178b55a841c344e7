//! Reading a workload from a trace.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::{Request, azure, mooncake};

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
