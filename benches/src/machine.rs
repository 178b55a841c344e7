//! Where a record was made.

use std::fs;

use serde::Serialize;

/// The machine.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// The processor's name for itself, or its architecture.
    pub cpu: String,
    /// Threads that run at once.
    pub cores: usize,
    /// The operating system.
    pub os: &'static str,
}

impl Machine {
    /// This one.
    pub fn this() -> Self {
        let named = fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_string())
        });
        Self {
            cpu: named.unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            os: std::env::consts::OS,
        }
    }
}
