//! `cargo run --release -p serve`

use std::process::ExitCode;

fn main() -> ExitCode {
    inference::program::run(serve::run::run)
}
