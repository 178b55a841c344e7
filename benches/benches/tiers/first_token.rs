//! The time to the first token of a long prompt, by where its keys and values are found.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use benches::{Record, is_smoke_test, median};
use inference::engine::Request;
use paged_attention::{KvCache, KvDtype, OffloadOptions, Tier};

use crate::device;
use crate::world::{BLOCK_SIZE, World};

pub(crate) fn measure(world: &World, dtype: KvDtype, record: &mut Record) -> Result<()> {
    let prompt = &world.prompt;
    let name = format!("{dtype}");
    let rounds = if is_smoke_test() { 1 } else { 7 };
    let full = prompt.len() / BLOCK_SIZE - usize::from(prompt.len().is_multiple_of(BLOCK_SIZE));

    // Another process would do all of this: the cache, the tier and its index are made anew.
    let new = || world.cache(dtype, prompt.len() + 1);
    let first_token =
        |cache: &KvCache, tier: Option<Arc<dyn Tier>>, from_tier: usize| -> Result<(f64, f64, Vec<u32>)> {
            let request = Request { prompt: prompt.clone(), max_tokens: 1 };
            let started = Instant::now();
            let outcome = world.generate(cache, tier, &[request], |_| ())?;
            let time = started.elapsed().as_secs_f64();
            let read = outcome.stats.read_from_tier.tokens;
            ensure!(read == from_tier, "{read} tokens were read from the tier, not {from_tier}");
            Ok((time, outcome.stats.read_from_tier.time.as_secs_f64(), outcome.answers[0].tokens.clone()))
        };

    let cache = new()?;
    let (computed, _, expected) = first_token(&cache, None, 0)?;
    record.value(&format!("computed/{name}"), "ttft_s", computed, "s");

    // The same blocks in a file.
    let cache = new()?;
    let tier = world.tier(&name, &cache, false)?;
    let offload = cache.pool().offload_to(tier.clone(), &OffloadOptions::default().write_through(true))?;
    let (written, _, answer) = first_token(&cache, Some(tier.clone()), 0)?;
    ensure!(answer == expected, "another token with write-through");
    record.value(&format!("computed, written through/{name}"), "ttft_s", written, "s");
    drop((offload, tier));
    device::sync(&world.file(&name))?;
    let bytes = std::fs::metadata(world.file(&name))?.len() as f64;

    let (mut times, mut loads): ([Vec<f64>; 4], [Vec<f64>; 4]) = Default::default();
    let mut device = Vec::new();
    for _ in 0..rounds {
        let (pool, _, answer) = first_token(&cache, None, 0)?;
        ensure!(answer == expected, "another token from the pool");
        times[0].push(pool);
        for (at, direct) in [(1, false), (2, true)] {
            let started = Instant::now();
            let fresh = new()?;
            let tier = world.tier(&name, &fresh, direct)?;
            times[3].push(started.elapsed().as_secs_f64());
            let found = tier.stats().blocks;
            ensure!(found as usize >= full, "{found} blocks of {full} were found after a restart");
            let (time, load, answer) = first_token(&fresh, Some(tier), full * BLOCK_SIZE)?;
            ensure!(answer == expected, "another token from the file");
            times[at].push(time);
            loads[at].push(load);
        }
        device.extend(device::seconds(&world.file(&name))?);
    }
    let device = median(device);
    for (case, times) in ["pool", "disk/warm", "disk/direct"].into_iter().zip(&times) {
        let (case, time) = (format!("{case}/{name}"), median(times.clone()));
        record.compared(&case, "ttft_s", time, "s", None, [("computed".to_owned(), computed / time)]);
    }
    let [.., opened] = times;
    record.value(&format!("open/{name}"), "time_s", median(opened), "s");
    // From the beginning of the load until the last block is in the pool. The device alone is the floor.
    for (case, loads) in ["disk/warm", "disk/direct"].into_iter().zip(loads.into_iter().skip(1)) {
        let (case, load) = (format!("{case}/{name}"), median(loads));
        record.compared(&case, "load_s", load, "s", Some(device / load), []);
        record.value(&case, "rate", bytes / load / 1e9, "GB/s");
    }
    record.value(&format!("device/{name}"), "rate", bytes / device / 1e9, "GB/s");
    record.value(&format!("device/{name}"), "bytes", bytes / 1e6, "MB");
    Ok(())
}
