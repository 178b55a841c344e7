//! What all benchmarks of this repository share: the record of a run, and the machine that it was made on.

mod machine;
mod record;

pub use machine::Machine;
pub use record::{Record, Row, results, target};

/// Whether every case runs only once, as a smoke test (`--test`).
pub fn is_smoke_test() -> bool {
    std::env::args().any(|arg| arg == "--test")
}

/// The median; NaN if there are no values.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
