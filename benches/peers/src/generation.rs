//! Generation with a real model: tokens per second of a batch of sequences of the context's length.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use batch_generate::measure::Filled;
use batch_generate::model::{Gguf, Model};
use batch_generate::weights::Weights;
use harness::Record;
use paged_attention::{KvDtype, LayerGroup};
use rayon::ThreadPool;

use crate::args::Effort;
use crate::child::Case;
use crate::environment::{Environment, Script};
use crate::floor::Floor;
use crate::turns::{self, FLOOR};

/// The most tokens that each sequence decodes before it goes back to the context.
const STEPS: usize = 8;

/// Measures decoding and prefill of the model in `path`. Both sides store keys and values as f16.
///
/// # Errors
///
/// If our contender fails.
pub fn generation(
    path: &Path,
    threads: &ThreadPool,
    floor: &mut Floor,
    python: &Environment,
    effort: Effort,
    record: &mut Record,
) -> Result<()> {
    let model = Model::load(&mut Gguf::open(path)?, Weights::Int8, usize::MAX)?;
    let file_bytes = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len() as usize;
    let (batches, contexts): (&[usize], &[usize]) = match effort {
        Effort::Smoke => (&[2], &[32]),
        Effort::Quick => (&[1, 8], &[128, 1024]),
        Effort::Full => (&[1, 4, 8, 16], &[128, 1024, 4096]),
    };
    let groups = model.groups();
    let shape = groups.first().context("a model has layers")?.shape();
    let layers = groups.iter().map(|group| group.layers().len()).sum();
    // Without the windows of models that have some.
    let of_group = |group: &LayerGroup| group.shape().bytes_per_block(1, KvDtype::F16);
    let token_bytes: Option<usize> = groups.iter().map(of_group).sum();
    let token_bytes = token_bytes.context("a token's bytes can be counted")?;
    for &context in contexts {
        for &batch in batches {
            let case = Case {
                kind: "generate",
                heads: 0, // the model has its own number of heads
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                batch,
                context,
                room: STEPS,
                dtype: "f16",
                layers,
            };
            let name = format!("batch {batch} context {context} KV f16 threads {}", threads.current_num_threads());
            eprintln!("generation {name}");

            let filled = Filled::new(&model, KvDtype::F16, batch, context, STEPS)?;
            let ours_prefill = filled.prefill();
            // Decoding reads all weights of the file and all keys and values, once per step.
            let bytes = file_bytes + batch * context * token_bytes;
            floor.grow(bytes);
            let mut contenders = vec![
                turns::contender("paged, weights int8", |times| {
                    let mut time = std::time::Duration::ZERO;
                    let mut left = times;
                    while left > 0 {
                        let steps = left.min(STEPS);
                        time += filled.decode(steps)?.time;
                        left -= steps;
                    }
                    Ok(time)
                }),
                turns::timed(FLOOR, |turn| {
                    floor.read(threads, bytes, turn);
                    Ok(())
                }),
            ];
            let peer = python.contender(Script::LlamaCpp, &case, "weights as in the file");
            let mut peer_prefill = None;
            if let Some((contender, output)) = peer {
                peer_prefill = output.first().map(|&ns| (contender.name.clone(), context as f64 / f64::from(ns) * 1e9));
                contenders.push(contender);
            }
            let started = Instant::now();
            let race = turns::take(contenders, effort)?;
            eprintln!("  {:.1?}", started.elapsed());
            turns::record_rate(&race, record, &format!("generation decode {name}"), batch as f64);
            let rate = ours_prefill.rate().unwrap_or(f64::NAN);
            let peer = peer_prefill.map(|(peer, its)| (peer, rate / its));
            record.compared(&format!("generation prefill {name}"), "rate", rate, "tokens/s", None, peer);
            python.clear();
        }
    }
    Ok(())
}
