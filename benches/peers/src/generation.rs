//! Generation with a real model: tokens per second of a batch of sequences of the context's length, that share nothing or
//! a system prompt.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use batch_generate::measure::{Blocks, Filled};
use inference::model::{Gguf, Model};
use inference::weights::Weights;
use harness::{Contender, Record};
use paged_attention::{KvDtype, LayerGroup};

use crate::args::Effort;
use crate::child::Case;
use crate::environment::Script;
use crate::machine::Machine;
use crate::turns::{self, FLOORS};

/// The most tokens that each sequence decodes before it goes back to the context.
const STEPS: usize = 8;

/// Measures decoding and prefill of the model in `path`. Both sides store keys and values as f16.
///
/// # Errors
///
/// If our contender fails.
pub fn generation(path: &Path, machine: &mut Machine<'_>, record: &mut Record) -> Result<()> {
    let model = Model::load(&mut Gguf::open(path)?, Weights::Int8, usize::MAX)?;
    let file_bytes = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len() as usize;
    let (batches, contexts): (&[usize], &[usize]) = match machine.effort {
        Effort::Smoke => (&[2], &[32]),
        Effort::Quick => (&[1, 8], &[128, 1024]),
        Effort::Full => (&[1, 4, 8, 16], &[128, 1024, 4096]),
    };
    let alone = contexts.iter().flat_map(|&context| batches.iter().map(move |&batch| (batch, 0, context)));
    // Prompts of 64 tokens behind a system prompt.
    let (batch, prefix) = if machine.effort == Effort::Smoke { (2, 32) } else { (32, 2000) };
    for (batch, prefix, context) in alone.chain([(batch, prefix, prefix + 64)]) {
        let groups = model.groups();
        let shape = groups.first().context("a model has layers")?.shape();
        let case = Case {
            kind: "generate",
            heads: 0, // the model has its own number of heads
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            batch,
            context,
            prefix,
            room: STEPS,
            dtype: "f16",
            layers: groups.iter().map(|group| group.layers().len()).sum(),
        };
        case_of(&model, file_bytes, &case, machine, record)?;
    }
    Ok(())
}

fn case_of(
    model: &Model,
    file_bytes: usize,
    case: &Case,
    machine: &mut Machine<'_>,
    record: &mut Record,
) -> Result<()> {
    let Case { batch, context, prefix, .. } = *case;
    let threads = machine.threads;
    let shared = if prefix == 0 { String::new() } else { format!(" prefix {prefix}") };
    let name = format!("batch {batch}{shared} context {context} KV f16 threads {}", threads.current_num_threads());
    eprintln!("generation {name}");

    let filled = match prefix {
        0 => Filled::new(model, KvDtype::F16, batch, context, STEPS)?,
        _ => Filled::behind(model, KvDtype::F16, batch, prefix, context - prefix, STEPS)?,
    };
    // Decoding reads all weights of the file and all keys and values, once per step. Without the windows of models that
    // have some.
    let of_group = |group: &LayerGroup| group.shape().bytes_per_block(1, KvDtype::F16);
    let token_bytes: Option<usize> = model.groups().iter().map(of_group).sum();
    let token_bytes = token_bytes.context("a token's bytes can be counted")?;
    let bytes = file_bytes + (prefix + batch * (context - prefix)) * token_bytes;
    machine.floor.grow(bytes);
    let floor = &*machine.floor;
    let reading = turns::timed(FLOORS[0], |turn| {
        floor.read(threads, bytes, turn);
        Ok(())
    });
    let (ours, variants): (&[(&str, Blocks)], &[&str]) = match prefix {
        0 => (&[("paged, weights int8", Blocks::Own)], &["weights as in the file"]),
        _ => (
            &[
                ("paged, shared blocks read once", Blocks::Shared),
                ("paged, shared blocks read for each", Blocks::SharedReadApart),
                ("paged, own blocks", Blocks::Own),
            ],
            &["unified", "own buffers"],
        ),
    };
    let mut contenders: Vec<_> = ours.iter().map(|&(name, blocks)| decoding(&filled, name, blocks)).collect();
    contenders.push(reading);
    let mut prefills = Vec::new();
    for variant in variants {
        if let Some((contender, output)) = machine.python.contender(Script::LlamaCpp, case, variant) {
            prefills.extend(output.first().map(|&ns| (contender.name.clone(), f64::from(ns))));
            contenders.push(contender);
        }
    }
    let started = Instant::now();
    let race = turns::take(contenders, machine.effort)?;
    eprintln!("  {:.1?}", started.elapsed());
    turns::record_rate(&race, record, &format!("generation decode {name}"), batch as f64);
    let prefill = filled.prefill();
    let rate = prefill.rate().unwrap_or(f64::NAN);
    let peers = prefills.into_iter().map(|(peer, ns)| (peer, rate / (prefill.tokens as f64 / ns * 1e9)));
    record.compared(&format!("generation prefill {name}"), "rate", rate, "tokens/s", None, peers);
    machine.python.clear();
    Ok(())
}

/// Decodes, and goes back to the context as often as there is room for the next tokens.
fn decoding<'a>(filled: &'a Filled<'_>, name: &str, blocks: Blocks) -> Contender<'a> {
    turns::contender(name, move |times| {
        let mut time = Duration::ZERO;
        let mut left = times;
        while left > 0 {
            let steps = left.min(STEPS);
            time += filled.decode(blocks, steps)?.time;
            left -= steps;
        }
        Ok(time)
    })
}
