//! The machine that a record was made on.

use std::fs;

use serde::{Deserialize, Serialize};

/// A machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's model name, or its architecture if the system does not say.
    pub cpu: String,
    /// Threads that can run at once.
    pub cores: usize,
    /// The operating system.
    pub os: String,
}

impl Machine {
    /// The machine that this program runs on.
    pub fn this() -> Self {
        let named = fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_string())
        });
        Self {
            cpu: named.unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            os: std::env::consts::OS.into(),
        }
    }
}
