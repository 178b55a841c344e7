//! Compares the paged KV cache with its peers, on the same machine in the same run.
//!
//! ```sh
//! cargo run --release --manifest-path benches/peers/Cargo.toml
//! ```
//!
//! A *part* (decode, shared, prefill, append, allocation, generation) has cases. A case has contenders: ours, the
//! floors of the machine, and the peers. They take turns, round after round ([`harness::Race`], [`turns`]); a ratio is the
//! median of each round's ratio.
//! Peers in Python are long-lived processes ([`child`]) that answer each line of JSON with a line of JSON. They run in
//! a virtual environment that is created if it does not exist ([`environment`]). A contender whose result differs from
//! ours is not measured.

pub mod append;
pub mod args;
pub mod attention;
pub mod bookkeeping;
pub mod candle;
pub mod child;
pub mod environment;
pub mod field;
pub mod floor;
pub mod generation;
pub mod idle;
pub mod machine;
pub mod numbers;
pub mod paged;
pub mod table;
pub mod turns;

pub use harness::{is_smoke_test, median};
