//! Shared code of all benchmarks: timing through criterion or in turns, and a record of the medians as JSON.
//!
//! `cargo bench -p benches` runs all benchmarks and writes `target/benchmarks/<name>.json`. `-- --test` runs each case
//! once as a smoke test and writes to `target/benchmarks/smoke/`.

mod stopwatch;

pub use harness::{
    CHAINS, Contender, Machine, Race, Record, Rounds, Row, is_smoke_test, median, multiply_adds, results,
};
pub use stopwatch::Stopwatch;
