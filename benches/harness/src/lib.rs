//! What all benchmarks of this repository share: contenders that take turns, the record of a run, the machine that it
//! was made on, and the limit of its arithmetic.

mod floor;
mod machine;
mod race;
mod record;

pub use floor::{CHAINS, multiply_adds};
pub use machine::Machine;
pub use race::{Contender, Race, Rounds};
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
