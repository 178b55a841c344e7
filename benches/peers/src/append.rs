//! Appending one token's keys and values to a long cache.

use std::hint::black_box;

use anyhow::Result;
use harness::Record;

use crate::args::Effort;
use crate::child::Case;
use crate::environment::{Environment, Script};
use crate::turns::{self, FLOORS};
use crate::{candle, paged};

/// Measures appending. One thread does the work, whatever the number of threads of a contender.
///
/// # Errors
///
/// If our contender fails.
pub fn append(threads: usize, python: &Environment, effort: Effort, record: &mut Record) -> Result<()> {
    let contexts: &[usize] = match effort {
        Effort::Smoke => &[64],
        Effort::Quick => &[4096],
        Effort::Full => &[512, 4096, 16_384],
    };
    for &context in contexts {
        let (heads, kv_heads, head_dim, batch, prefix, room, dtype, layers) = (8, 8, 128, 1, 0, 512, "f32", 1);
        let case = Case { kind: "append", heads, kv_heads, head_dim, batch, context, prefix, room, dtype, layers };
        let name = format!("append {kv_heads}x{head_dim} {dtype} context {context} threads {threads}");
        eprintln!("{name}");

        let mut contenders = vec![paged::append(&case)?];
        // The floor: the same bytes, copied to the slot of the next token of a sequence.
        let token = vec![1f32; kv_heads * head_dim];
        let mut memory = vec![0f32; 2 * (context + room) * token.len()];
        contenders.push(turns::timed(FLOORS[0], move |turn| {
            for half in memory.chunks_exact_mut((context + room) * token.len()) {
                let at = (context + turn % room) * token.len();
                half[at..at + token.len()].copy_from_slice(black_box(&token));
            }
            Ok(())
        }));
        for (script, variants) in [(Script::Torch, &["in place", "cat"][..]), (Script::Vllm, &["blocks of 16"])] {
            contenders
                .extend(variants.iter().filter_map(|variant| python.contender(script, &case, variant)).map(|(c, _)| c));
        }
        contenders.extend(candle::append(&case)?);
        turns::record_time(&turns::take(contenders, effort)?, record, &name);
        python.clear();
    }
    Ok(())
}
