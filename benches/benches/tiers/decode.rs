//! Sequences decode while their blocks are written through to a file, and while they are not, in turns.

use std::time::{Duration, Instant};

use anyhow::Result;
use benches::{Record, is_smoke_test, median};
use inference::engine::Request;
use paged_attention::{KvDtype, OffloadOptions};

use crate::world::World;

const SEQUENCES: usize = 8;

pub(crate) fn with_write_through(world: &World, record: &mut Record) -> Result<()> {
    let (rounds, prompt, answer) = if is_smoke_test() { (1, 20, 4) } else { (7, 256, 128) };
    let dtype = KvDtype::F32;
    let (mut ratios, mut slowest) = (Vec::new(), [Vec::new(), Vec::new()]);
    for round in 0..rounds {
        let mut rates = [0.0; 2];
        for writes in [round % 2 == 0, round % 2 == 1] {
            let cache = world.cache(dtype, SEQUENCES * (prompt + answer + 16))?;
            let tier = world.tier(&format!("decode {round} {writes}"), &cache, false)?;
            let options = OffloadOptions::default().write_through(true);
            let offload = if writes { Some(cache.pool().offload_to(tier.clone(), &options)?) } else { None };
            let of = |at: usize| (0..prompt as u32).map(|token| (token * 8 + at as u32) % 40_000).collect();
            let requests: Vec<_> = (0..SEQUENCES).map(|at| Request { prompt: of(at), max_tokens: answer }).collect();
            // The longest step in which all decode.
            let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
            let outcome = world.generate(&cache, None, &requests, |progress| {
                if progress.answers().all(|(tokens, _)| tokens.len() > 1) {
                    longest = longest.max(last.elapsed());
                }
                last = Instant::now();
            })?;
            rates[usize::from(writes)] = outcome.stats.decode.rate().unwrap_or(f64::NAN);
            slowest[usize::from(writes)].push(longest.as_secs_f64() * 1e3);
            drop(offload);
            drop(tier);
            std::fs::remove_file(world.file(&format!("decode {round} {writes}")))?;
        }
        ratios.push(rates[1] / rates[0]);
    }
    record.value("decode/written through", "of_without", median(ratios), "");
    for (case, slowest) in ["decode/without", "decode/written through"].into_iter().zip(slowest) {
        record.value(case, "slowest_step_ms", median(slowest), "ms");
    }
    Ok(())
}
