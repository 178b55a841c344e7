# What CI runs, piece by piece.

default:
    @just --list

# Everything that has to pass before a change lands
ci:
    .ci/run

test:
    cargo test --workspace

# Random histories of the blocks and tables: `just properties 100000`
properties cases="10000":
    PROPTEST_CASES={{cases}} cargo test --package block_table --no-default-features --test properties

# Every interleaving of two threads on the pool, and on the map of sequences
loom:
    RUSTFLAGS='--cfg loom' CARGO_TARGET_DIR=target/loom \
        cargo test --release --package block_pool --package block_table --no-default-features --test loom

lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --features batch_generate/verify -- -D warnings
    RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps

# The libraries on the oldest candle they support
oldest-candle:
    .ci/oldest-candle

# The real model against candle's own, token for token
verify *args:
    cargo run --release --package batch_generate --features verify -- --verify {{args}}

# The pool beside other block managers; builds them first
peers:
    cargo bench --manifest-path benches/peers/Cargo.toml --bench block_managers

bench *args:
    cargo bench --package benches {{args}}
