# The commands that CI runs, one by one, and some others.

default:
    @just --list

# Everything that has to pass before a change lands
ci:
    .ci/run

# All tests. Tests that need the model print SKIPPED without it; `PAGED_KV_NEEDS_MODEL=1 just test` makes that an error
test:
    cargo test --workspace

# Random histories of pools and tables: `just properties 100000`
properties cases="10000":
    PROPTEST_CASES={{cases}} cargo test --package paged-kv-table --no-default-features --test properties

# Every interleaving of two threads on the pool, and on the map of sequences
loom:
    RUSTFLAGS='--cfg loom' CARGO_TARGET_DIR=target/loom \
        cargo test --release --package paged-kv-pool --package paged-kv-table --no-default-features --test loom

# Processes that store blocks in a file are killed at random instants: `just kills 500`
kills times="500":
    DISK_TIER_KILLS={{times}} cargo test --package paged-kv-disk --test kills -- --nocapture

lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --features batch_generate/verify -- -D warnings
    RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps

# The tests of the libraries with the oldest candle they support
oldest-candle:
    .ci/oldest-candle

# The libraries with the oldest Rust and the oldest candle they support; needs rustup
oldest-rust:
    .ci/oldest-rust

# Packs the libraries as for the registry, and tests the archives
packages *args:
    .ci/packages {{args}}

# NVIDIA Dynamo's router reads the KV events
router:
    cargo test --manifest-path crates/kv_events/router_tests/Cargo.toml

# Licences, duplicates and sources of all dependencies; needs cargo-deny
deny:
    cargo deny check licenses bans sources

# Compares the real model token for token with candle's own
verify *args:
    cargo run --release --package batch_generate --features verify -- --verify {{args}}

# Benchmarks in comparison with PyTorch, vLLM, llama.cpp, candle and kvbm-logical: `just peers --quick --only decode`
peers *args:
    cargo run --release --manifest-path benches/peers/Cargo.toml -- {{args}}

bench *args:
    cargo bench --package benches {{args}}

# Random input for a fuzz target (tables, model_file, prompts, int8); needs a nightly toolchain and cargo-fuzz
fuzz target seconds="60":
    cargo +nightly fuzz run {{target}} -- -max_total_time={{seconds}}

# The kernels under AddressSanitizer; needs a nightly toolchain
asan:
    ASAN_OPTIONS=allocator_may_return_null=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/asan \
        cargo +nightly test --package paged-kv-attention --target x86_64-unknown-linux-gnu --tests

# The kernels of 64-bit Arm in an emulator; needs qemu-user-static and gcc-aarch64-linux-gnu
neon:
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER='qemu-aarch64-static -L /usr/aarch64-linux-gnu' \
        cargo test --package paged-kv-attention --target aarch64-unknown-linux-gnu --lib --test attention

# The server under 64 clients of which some go away, ask nonsense, or read slowly: `just load 600 --slow`
load seconds="600" *args:
    cargo build --release --package serve
    python3 examples/serve/clients/load.py target/release/serve --seconds {{seconds}} {{args}}

# The server under OpenAI's Python client, which must be installed
openai-client:
    cargo build --release --package serve
    python3 examples/serve/clients/openai_client.py target/release/serve
