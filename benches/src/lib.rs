//! Shared code of all benchmarks: timing through criterion or in turns, and a record of the medians as JSON.
//!
//! `cargo bench -p benches` runs all benchmarks and writes `target/benchmarks/<name>.json`. `-- --test` runs each case
//! once as a smoke test and writes to `target/benchmarks/smoke/`.

mod machine;
mod race;
mod record;
mod stopwatch;

pub use machine::Machine;
pub use race::{Contender, Race};
pub use record::{Record, Row, results};
pub use stopwatch::Stopwatch;

/// Whether every case runs only once, as a smoke test (`--test`).
pub fn is_smoke_test() -> bool {
    std::env::args().any(|arg| arg == "--test")
}
