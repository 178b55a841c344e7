//! Attention over blocks beside the machine's floor and candle's own attention: one new token for each sequence, and the
//! prefill of one, whose floor is the time that as many multiply-adds take in registers.
//!
//! All contenders of a case take turns in one run, on the same threads. Layers take turns too, over at least half a
//! gibibyte, so that the caches see keys and values only once in a while, as when a whole model runs.
//!
//! - `plain` reads the same blocks in the same order once through; `four streams` reads the same bytes as four
//!   interleaved streams, the most that this memory gives.
//! - Two callers, each with a thread and a sequence of its own in one cache, stand beside one of them.
//! - candle's grouped matrix products and its flash attention read a contiguous cache that is there already.

mod case;
mod decode;
mod floor;
mod prefill;
mod together;

use anyhow::Result;
use benches::{Record, is_smoke_test};
use paged_attention::KvDtype;

use case::Case;

/// Seconds for which contenders take turns.
const SECONDS: f64 = 0.8;

fn main() -> Result<()> {
    let mut record = Record::default();
    // `cargo bench -p benches --bench paged_attention -- f16` runs the cases whose name has `f16` in it.
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let contexts: &[usize] = if is_smoke_test() { &[64] } else { &[4096, 16_384] };
    for (heads, kv_heads, head_dim) in [(32, 8, 128), (9, 3, 64)] {
        for &context in contexts {
            for batch in [1, 8] {
                for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8] {
                    for threads in [1, 2] {
                        let paged = Case {
                            heads,
                            kv_heads,
                            head_dim,
                            batch,
                            context,
                            dtype,
                            threads,
                            block_size: 16,
                            shuffled: false,
                            cached: false,
                        };
                        let mut cases = vec![paged];
                        if heads == 32 && batch == 1 && dtype != KvDtype::Bf16 {
                            cases.push(Case { block_size: paged.capacity(), ..paged });
                            cases.push(Case { shuffled: true, ..paged });
                        }
                        for case in cases.iter().filter(|case| case.name().contains(&filter)) {
                            eprintln!("{}", case.name());
                            on_its_threads(case, &mut record, decode::decode)?;
                        }
                    }
                }
            }
        }
    }
    for dtype in KvDtype::ALL {
        for threads in [1, 2] {
            let (heads, kv_heads, head_dim, batch) = (32, 8, 128, 1);
            let context = if is_smoke_test() { 64 } else { 2048 };
            let (block_size, shuffled, cached) = (16, false, false);
            let case = Case { heads, kv_heads, head_dim, batch, context, dtype, threads, block_size, shuffled, cached };
            if format!("prefill {}", case.name()).contains(&filter) {
                eprintln!("prefill {}", case.name());
                on_its_threads(&case, &mut record, prefill::prefill)?;
            }
        }
    }
    for dtype in KvDtype::ALL {
        for cached in [true, false] {
            let (heads, kv_heads, head_dim, batch, threads) = (32, 8, 128, 2, 1);
            let context = if is_smoke_test() { 64 } else { 256 };
            let (block_size, shuffled) = (16, false);
            let case = Case { heads, kv_heads, head_dim, batch, context, dtype, threads, block_size, shuffled, cached };
            if format!("two callers {}", case.name()).contains(&filter) {
                eprintln!("two callers {}", case.name());
                together::together(&case, &mut record)?;
            }
        }
    }
    record.write("paged_attention")
}

fn on_its_threads(case: &Case, record: &mut Record, measure: fn(&Case, &mut Record) -> Result<()>) -> Result<()> {
    rayon::ThreadPoolBuilder::new().num_threads(case.threads).build()?.install(|| measure(case, record))
}
