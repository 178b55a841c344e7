//! What the device itself takes to read a file, past the system's cache.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Result;

/// Seconds to read the whole file in large requests, one after the other; `None` where there are no direct reads.
pub(crate) fn seconds(file: &Path) -> Result<Option<f64>> {
    let input = format!("if={}", file.display());
    let started = Instant::now();
    let read =
        Command::new("dd").args([&*input, "of=/dev/null", "bs=8M", "iflag=direct"]).stderr(Stdio::null()).status();
    Ok(read.is_ok_and(|status| status.success()).then(|| started.elapsed().as_secs_f64()))
}

/// Has the device write everything, so that it is not busy with that later.
pub(crate) fn sync(file: &Path) -> Result<()> {
    Ok(std::fs::File::open(file)?.sync_all()?)
}
