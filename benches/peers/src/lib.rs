//! What the benchmarks against other block managers share: the two contestants, behind the same few calls, and the way
//! they are timed and reported.
//!
//! `cargo bench --manifest-path benches/peers/Cargo.toml` writes `target/benchmarks/block_managers.json` of the
//! repository; with `-- --test` it only shows that everything runs, and writes to `target/benchmarks/smoke/`.

mod kvbm;
// The file itself, not its package: that one builds candle.
#[path = "../../src/machine.rs"]
mod machine;
mod ours;
mod prompts;
mod race;
mod report;
mod threads;

pub use kvbm::{Backend, Kvbm, NAME as KVBM, hashes};
pub use kvbm_logical::SequenceHash;
pub use machine::Machine;
pub use ours::Ours;
pub use prompts::Prompts;
pub use race::{Race, Standing};
pub use report::{Line, Report, Target};
pub use threads::throughput;

/// Tokens per block, on both sides.
pub const BLOCK_SIZE: usize = 16;

/// Whether everything is to run briefly, to see that it works.
pub fn is_smoke_test() -> bool {
    std::env::args().any(|arg| arg == "--test")
}

/// The middle one, in order of size.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
