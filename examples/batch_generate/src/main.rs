//! `cargo run --release -p batch_generate`

use std::process::ExitCode;

fn main() -> ExitCode {
    inference::program::run(batch_generate::run::run)
}
