//! The paged KV cache beside its peers, on the same machine in the same run.
//!
//! ```sh
//! cargo run --release --manifest-path benches/peers/Cargo.toml
//! ```
//!
//! A *part* (decode, prefill, append, allocation, generation) has cases; a case has contenders: ours, the machine's floor, and
//! the peers. They take turns, round after round ([`turns`]); a ratio is the median of each round's ratio. Peers in Python
//! are long-lived processes ([`child`]) that speak a line of JSON for a line of JSON, in a virtual environment that is made
//! when it is missing ([`environment`]). Who computes something else than ours is not measured.

pub mod append;
pub mod args;
pub mod attention;
pub mod bookkeeping;
pub mod candle;
pub mod child;
pub mod environment;
pub mod floor;
pub mod generation;
// The file itself, not its package, which has dependencies of its own.
#[path = "../../src/machine.rs"]
pub mod machine;
pub mod numbers;
pub mod paged;
pub mod record;
pub mod table;
pub mod turns;

/// Whether everything is to run briefly, to see that it works.
pub fn is_smoke_test() -> bool {
    std::env::args().any(|arg| arg == "--test")
}

/// The middle one, in order of size; not a number if there is none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
