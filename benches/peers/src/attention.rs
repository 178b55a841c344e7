//! Attention: decoding one new token for each sequence of a batch, also of sequences that begin alike, and the prefill of
//! one sequence.

use anyhow::Result;
use harness::{Contender, Record};

use crate::args::Effort;
use crate::child::Case;
use crate::environment::Script;
use crate::field::Field;
use crate::floor;
use crate::machine::Machine;
use crate::turns::{self, FLOORS};
use crate::{candle, paged};

/// Bytes of keys and values that calls rotate over, so that they come from memory, as they do when a whole model runs.
const COLD: usize = 512 << 20;

/// Tokens of each sequence behind those that all share.
const TAIL: usize = 128;

/// Query heads, key and value heads, and dimensions of a head: of an 8-billion-parameter llama, and of SmolLM2-135M.
const HEADS: [(usize, usize, usize); 2] = [(32, 8, 128), (9, 3, 64)];

/// Measures decoding.
///
/// # Errors
///
/// If our contender fails.
pub fn decode(machine: &mut Machine<'_>, record: &mut Record) -> Result<()> {
    let sizes: &[(usize, usize)] = match machine.effort {
        Effort::Smoke => &[(2, 64)],
        Effort::Quick => &[(1, 4096), (8, 4096)],
        Effort::Full => &[(1, 512), (1, 4096), (1, 16_384), (8, 4096), (8, 16_384)],
    };
    for (heads, kv_heads, head_dim) in HEADS {
        for dtype in ["f32", "f16", "bf16", "int8"] {
            for &(batch, context) in sizes {
                let (kind, prefix, room, layers) = ("decode", 0, 0, 1);
                let case = Case { kind, heads, kv_heads, head_dim, batch, context, prefix, room, dtype, layers };
                decode_case(cold(case, machine.effort), machine, record)?;
            }
        }
    }
    Ok(())
}

/// The bytes of a layer's keys and values, of each shared token once.
fn bytes(case: &Case) -> usize {
    let bytes_each = match case.dtype {
        "f32" => 4,
        "int8" => 1,
        _ => 2,
    };
    let tokens = case.prefix + case.batch * (case.context - case.prefix);
    2 * tokens * case.kv_heads * case.head_dim * bytes_each
}

/// The case with so many layers that their keys and values come from memory.
fn cold(case: Case, effort: Effort) -> Case {
    let layers = if effort == Effort::Smoke { 2 } else { COLD.div_ceil(bytes(&case)) };
    Case { layers, ..case }
}

fn decode_case(case: Case, machine: &mut Machine<'_>, record: &mut Record) -> Result<()> {
    let (case, bytes) = (&case, bytes(&case));
    let name = name_of(case, machine);
    eprintln!("{name}");
    machine.floor.grow(if machine.effort == Effort::Smoke { bytes } else { bytes.max(COLD) });
    let mut sequences = paged::Decode::new(case)?;
    let layers = if case.dtype == "int8" { None } else { Some(candle::Layers::new(case)?) };
    let mut field = Field::new(case, sequences.contender(machine.threads)?);
    let threads = machine.threads;
    field.add_floor(reading(machine, bytes));
    for (script, variants) in [
        (Script::Torch, ["plain", "group as rows"]),
        (Script::Vllm, ["blocks of 16", "blocks of 128"]),
        (Script::Ggml, ["head-major", "token-major"]),
    ] {
        field.add_python(machine.python, script, &variants, case);
    }
    if let Some(layers) = &layers {
        field.add(candle::grouped(case, layers, threads)?);
        if case.dtype != "bf16" {
            field.add(candle::flash(case, layers, threads)?);
        }
    }
    let race = turns::take(field.contenders, machine.effort)?;
    turns::record_time(&race, record, &name);
    record.value(&name, "bandwidth", bytes as f64 / race.time(0), "GB/s");
    machine.python.clear();
    Ok(())
}

/// The floor of reading this many bytes.
fn reading<'a>(machine: &'a Machine<'_>, bytes: usize) -> Contender<'a> {
    let (floor, threads) = (&*machine.floor, machine.threads);
    turns::timed_on(threads, FLOORS[0], move |turn| {
        floor.read(threads, bytes, turn);
        Ok(())
    })
}

/// The floor of this many multiply-adds.
fn computing<'a>(machine: &'a Machine<'_>, multiply_adds: usize) -> Contender<'a> {
    let threads = machine.threads;
    turns::timed_on(threads, FLOORS[1], move |_| {
        floor::multiply_adds(threads, multiply_adds);
        Ok(())
    })
}

/// Measures decoding of sequences that begin alike.
///
/// # Errors
///
/// If our contender fails.
pub fn shared(machine: &mut Machine<'_>, record: &mut Record) -> Result<()> {
    let (prefixes, batches): (&[usize], &[usize]) = match machine.effort {
        Effort::Smoke => (&[64], &[2]),
        Effort::Quick => (&[4096], &[8, 32]),
        Effort::Full => (&[512, 4096, 16_384], &[2, 8, 32, 64]),
    };
    for (heads, kv_heads, head_dim) in HEADS {
        for dtype in ["f32", "f16", "bf16", "int8"] {
            for &prefix in prefixes {
                for &batch in batches {
                    let (kind, context, room, layers) = ("shared", prefix + TAIL, 0, 1);
                    let case = Case { kind, heads, kv_heads, head_dim, batch, context, prefix, room, dtype, layers };
                    shared_case(cold(case, machine.effort), machine, record)?;
                }
            }
        }
    }
    Ok(())
}

fn shared_case(case: Case, machine: &mut Machine<'_>, record: &mut Record) -> Result<()> {
    let (case, bytes) = (&case, bytes(&case));
    let name = name_of(case, machine);
    eprintln!("{name}");
    machine.floor.grow(if machine.effort == Effort::Smoke { bytes } else { bytes.max(COLD) });
    let mut sequences = paged::Decode::new(case)?;
    let mut field = Field::new(case, sequences.contender(machine.threads)?);
    field.add_floor(reading(machine, bytes));
    // One for each number of a key and of a value, in each query head.
    let multiply_adds = 2 * case.batch * case.context * case.heads * case.head_dim;
    field.add_floor(computing(machine, multiply_adds));
    for (script, variants) in [
        (Script::Torch, &["copies", "copies, group as rows", "cascade"][..]),
        (Script::Vllm, &["blocks of 16", "blocks of 128"]),
        (Script::Ggml, &["copies, head-major", "unified, head-major", "unified, token-major"]),
    ] {
        field.add_python(machine.python, script, variants, case);
    }
    let race = turns::take(field.contenders, machine.effort)?;
    turns::record_time(&race, record, &name);
    record.value(&name, "useful", 2.0 * multiply_adds as f64 / race.time(0), "GFLOP/s");
    machine.python.clear();
    Ok(())
}

/// Measures prefill.
///
/// # Errors
///
/// If our contender fails.
pub fn prefill(machine: &mut Machine<'_>, record: &mut Record) -> Result<()> {
    let contexts: &[usize] = match machine.effort {
        Effort::Smoke => &[48],
        Effort::Quick => &[2048],
        Effort::Full => &[512, 2048],
    };
    for (heads, kv_heads, head_dim) in HEADS {
        for dtype in ["f32", "f16", "bf16", "int8"] {
            for &context in contexts {
                let (kind, batch, prefix, room, layers) = ("prefill", 1, 0, 0, 1);
                let case = Case { kind, heads, kv_heads, head_dim, batch, context, prefix, room, dtype, layers };
                prefill_case(&case, machine, record)?;
            }
        }
    }
    Ok(())
}

fn prefill_case(case: &Case, machine: &Machine<'_>, record: &mut Record) -> Result<()> {
    let name = name_of(case, machine);
    eprintln!("{name}");
    // Each token sees itself and the tokens before it, with one multiply-add per number of the key and of the value.
    let multiply_adds = case.context * (case.context + 1) * case.heads * case.head_dim;
    let threads = machine.threads;
    // candle's flash attention has no bf16, and its f16 takes half a minute for 2,048 tokens.
    let candle_takes_part = case.dtype == "f32" || case.dtype == "f16" && case.context <= 512;
    let layers = if candle_takes_part { Some(candle::Layers::new(case)?) } else { None };
    let mut field = Field::new(case, paged::prefill(case, threads)?);
    field.add_floor(computing(machine, multiply_adds));
    for (script, variants) in [
        (Script::Torch, &["plain"][..]),
        (Script::Vllm, &["blocks of 16", "blocks of 128"]),
        (Script::Ggml, &["head-major"]),
    ] {
        field.add_python(machine.python, script, variants, case);
    }
    if let Some(layers) = &layers {
        field.add(candle::flash(case, layers, threads)?);
    }
    let race = turns::take(field.contenders, machine.effort)?;
    turns::record_time(&race, record, &name);
    record.value(&name, "useful", 2.0 * multiply_adds as f64 / race.time(0), "GFLOP/s");
    machine.python.clear();
    Ok(())
}

fn name_of(case: &Case, machine: &Machine<'_>) -> String {
    let Case { kind, heads, kv_heads, head_dim, batch, context, prefix, dtype, .. } = case;
    let threads = machine.threads.current_num_threads();
    let prefix = if *prefix == 0 { String::new() } else { format!(" prefix {prefix}") };
    format!("{kind} {heads}/{kv_heads}x{head_dim} {dtype} batch {batch}{prefix} context {context} threads {threads}")
}
