//! What all benchmarks share: timing through criterion or in turns, and a record of the medians as JSON.
//!
//! `cargo bench -p benches` runs them all and writes `target/benchmarks/<name>.json`; `-- --test` runs each once, to see
//! that it works, and writes to `target/benchmarks/smoke/`.

mod machine;
mod race;
mod record;
mod stopwatch;

pub use machine::Machine;
pub use race::{Contender, Race};
pub use record::{Record, Row, results};
pub use stopwatch::Stopwatch;

/// Whether every case is to run once, to see that it works.
pub fn is_smoke_test() -> bool {
    std::env::args().any(|arg| arg == "--test")
}
