//! Attention over blocks, compared with the machine's floor and candle's own attention: one new token for each
//! sequence, and the prefill of one sequence, whose floor is the time of the same number of multiply-adds in registers.
//!
//! All contenders of a case take turns in one run, on the same threads. Calls rotate over layers of at least half a
//! gibibyte together, so that keys and values come from memory, as they do when a whole model runs.
//!
//! - `plain` reads the same blocks in the same order, each from start to end. `four streams` reads the same bytes as
//!   four interleaved streams, which gives the highest bandwidth of this memory.
//! - Sequences in one block, and in blocks in random order, are compared with sequences in blocks in order.
//! - Two callers, each with a thread and a sequence of its own in one cache, are compared with one caller.
//! - Sequences that begin alike are compared with one sequence, and with reading what they share for each. Finding out
//!   what they share is measured by itself where they share nothing.
//! - candle's grouped matrix products and its flash attention read a contiguous cache that already exists.

mod case;
mod decode;
mod floor;
mod orders;
mod planning;
mod prefill;
mod shared;
mod together;

use anyhow::{Result, ensure};
use benches::{Record, is_smoke_test};
use paged_attention::KvDtype;

use case::Case;
use shared::Tree;

/// Seconds for which contenders take turns.
const SECONDS: f64 = 0.8;

const USAGE: &str = "usage: cargo bench -p benches --bench paged_attention [-- PART_OF_A_CASE'S_NAME], for example f16";

/// Measures a case. Runs in a pool of `case.threads` threads.
type Measure = fn(&Case, &mut Record) -> Result<()>;

/// Measures sequences that begin alike.
const SHARED: [(&str, Measure); 2] = [
    ("shared ", |case, record| shared::shared(case, Tree::OneLevel, record)),
    ("shared tree ", |case, record| shared::shared(case, Tree::ThreeLevels, record)),
];

fn main() -> Result<()> {
    let mut record = Record::default();
    // Cargo adds `--bench`; `is_smoke_test` reads `--test`.
    let arguments = std::env::args().skip(1).filter(|argument| !["--bench", "--test"].contains(&argument.as_str()));
    let arguments: Vec<_> = arguments.collect();
    ensure!(arguments.len() <= 1 && !arguments.iter().any(|argument| argument.starts_with('-')), USAGE);
    let filter = arguments.into_iter().next().unwrap_or_default();
    for (kind, case, measure) in cases() {
        let name = format!("{kind}{}", case.name());
        if name.contains(&filter) {
            eprintln!("{name}");
            let threads = rayon::ThreadPoolBuilder::new().num_threads(case.threads).build()?;
            threads.install(|| measure(&case, &mut record))?;
        }
    }
    record.write("paged_attention")
}

/// All cases, each with a prefix of its name and the function that measures it.
fn cases() -> Vec<(&'static str, Case, Measure)> {
    let contexts: &[usize] = if is_smoke_test() { &[64] } else { &[4096, 16_384] };
    let (prompt, short) = if is_smoke_test() { (64, 64) } else { (2048, 256) };
    let any = Case {
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        batch: 1,
        context: prompt,
        dtype: KvDtype::F32,
        threads: 1,
        block_size: 16,
        shuffled: false,
        cached: false,
    };
    let mut all: Vec<(&str, Case, Measure)> = Vec::new();
    for (heads, kv_heads, head_dim) in [(32, 8, 128), (9, 3, 64)] {
        for (&context, batch) in contexts.iter().flat_map(|context| [(context, 1), (context, 8)]) {
            for (dtype, threads) in KvDtype::ALL.into_iter().flat_map(|dtype| [(dtype, 1), (dtype, 2)]) {
                let paged = Case { heads, kv_heads, head_dim, batch, context, dtype, threads, ..any };
                all.push(("", paged, decode::decode));
                if heads == 32 && batch == 1 && dtype != KvDtype::Bf16 {
                    all.push(("", Case { block_size: paged.capacity(), ..paged }, decode::decode));
                    all.push(("", Case { shuffled: true, ..paged }, decode::decode));
                    all.push(("orders ", paged, orders::orders));
                }
            }
        }
    }
    let prefixes: &[usize] = if is_smoke_test() { &[64] } else { &[512, 4096, 16_384] };
    for ((heads, kv_heads, head_dim), dtype) in
        [(32, 8, 128), (9, 3, 64)].into_iter().flat_map(|shape| KvDtype::ALL.map(|dtype| (shape, dtype)))
    {
        for (&context, batch) in prefixes.iter().flat_map(|prefix| [2, 8, 32, 64].map(|batch| (prefix, batch))) {
            let case = Case { heads, kv_heads, head_dim, batch, context, dtype, threads: 2, ..any };
            let [one_level, tree] = SHARED.map(|(kind, measure)| (kind, case, measure));
            all.push(one_level);
            if context == 4096 {
                all.push(("shared ", Case { threads: 1, ..case }, one_level.2));
                all.push(tree);
            }
        }
    }
    let contexts: &[usize] = if is_smoke_test() { &[64] } else { &[512, 4096] };
    for (heads, kv_heads, head_dim) in [(32, 8, 128), (9, 3, 64)] {
        for (&context, batch) in contexts.iter().flat_map(|context| [2, 8, 64].map(|batch| (context, batch))) {
            for dtype in [KvDtype::F32, KvDtype::Int8] {
                let case = Case { heads, kv_heads, head_dim, batch, context, dtype, threads: 2, ..any };
                all.push(("planning ", case, planning::planning));
            }
        }
    }
    for dtype in KvDtype::ALL {
        for threads in [1, 2] {
            all.push(("prefill ", Case { dtype, threads, ..any }, prefill::prefill));
        }
        for cached in [true, false] {
            let case = Case { batch: 2, context: short, dtype, cached, ..any };
            all.push(("two callers ", case, together::together));
        }
    }
    all
}
