//! Attention: decoding one new token for each sequence of a batch, and the prefill of one sequence.

use anyhow::Result;
use harness::{Contender, Record};
use rayon::ThreadPool;

use crate::args::Effort;
use crate::child::Case;
use crate::environment::{Environment, Script};
use crate::floor::{self, Floor};
use crate::turns::{self, FLOOR};
use crate::{candle, paged};

/// Bytes of keys and values that calls rotate over, so that they come from memory, as they do when a whole model runs.
const COLD: usize = 512 << 20;

/// Query heads, key and value heads, and dimensions of a head: of an 8-billion-parameter llama, and of SmolLM2-135M.
const HEADS: [(usize, usize, usize); 2] = [(32, 8, 128), (9, 3, 64)];

/// The threads, floor and peers that attention is measured with.
#[derive(Debug)]
pub struct Machine<'a> {
    /// The threads of all contenders in this process.
    pub threads: &'a ThreadPool,
    /// The memory that the floor reads.
    pub floor: &'a mut Floor,
    /// The peers in Python.
    pub python: &'a Environment,
    /// How thorough the run is.
    pub effort: Effort,
}

impl Machine<'_> {
    fn name(&self, case: &Case) -> String {
        let Case { kind, heads, kv_heads, head_dim, batch, context, dtype, .. } = case;
        let threads = self.threads.current_num_threads();
        format!("{kind} {heads}/{kv_heads}x{head_dim} {dtype} batch {batch} context {context} threads {threads}")
    }
}

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
                let bytes_each = match dtype {
                    "f32" => 4,
                    "int8" => 1,
                    _ => 2,
                };
                let bytes = 2 * batch * context * kv_heads * head_dim * bytes_each;
                let layers = if machine.effort == Effort::Smoke { 2 } else { COLD.div_ceil(bytes) };
                let case = Case { kind: "decode", heads, kv_heads, head_dim, batch, context, room: 0, dtype, layers };
                decode_case(&case, bytes, machine, record)?;
            }
        }
    }
    Ok(())
}

fn decode_case(case: &Case, bytes: usize, machine: &mut Machine<'_>, record: &mut Record) -> Result<()> {
    let name = machine.name(case);
    eprintln!("{name}");
    machine.floor.grow(if machine.effort == Effort::Smoke { bytes } else { bytes.max(COLD) });
    let mut sequences = paged::Decode::new(case)?;
    let layers = if case.dtype == "int8" { None } else { Some(candle::Layers::new(case)?) };
    let mut field = Field::new(case, sequences.contender(machine.threads)?);
    let (floor, threads) = (&*machine.floor, machine.threads);
    field.add_floor(turns::timed_on(threads, FLOOR, move |turn| {
        floor.read(threads, bytes, turn);
        Ok(())
    }));
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
                let (batch, room, layers) = (1, 0, 1);
                let case = Case { kind: "prefill", heads, kv_heads, head_dim, batch, context, room, dtype, layers };
                prefill_case(&case, machine, record)?;
            }
        }
    }
    Ok(())
}

fn prefill_case(case: &Case, machine: &Machine<'_>, record: &mut Record) -> Result<()> {
    let name = machine.name(case);
    eprintln!("{name}");
    // Each token sees itself and the tokens before it, with one multiply-add per number of the key and of the value.
    let multiply_adds = case.context * (case.context + 1) * case.heads * case.head_dim;
    let threads = machine.threads;
    // candle's flash attention has no bf16, and its f16 takes half a minute for 2,048 tokens.
    let candle_takes_part = case.dtype == "f32" || case.dtype == "f16" && case.context <= 512;
    let layers = if candle_takes_part { Some(candle::Layers::new(case)?) } else { None };
    let mut field = Field::new(case, paged::prefill(case, threads)?);
    field.add_floor(turns::timed_on(threads, FLOOR, move |_| {
        floor::multiply_adds(threads, multiply_adds);
        Ok(())
    }));
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

/// The contenders of a case, all with the same result as the first.
struct Field<'a> {
    contenders: Vec<Contender<'a>>,
    expected: Vec<f32>,
    tolerance: f32,
}

impl<'a> Field<'a> {
    fn new(case: &Case, (ours, expected): (Contender<'a>, Vec<f32>)) -> Self {
        // As a share of the largest number of the result. Some contenders round scores and sums to 16 bits; a wrong
        // result differs by about the whole number.
        let tolerance = if case.dtype == "f32" { 1e-3 } else { 1e-1 };
        Self { contenders: vec![ours], expected, tolerance }
    }

    fn add_floor(&mut self, floor: Contender<'a>) {
        self.contenders.push(floor);
    }

    fn add(&mut self, (contender, output): (Contender<'a>, Vec<f32>)) {
        match difference(&self.expected, &output) {
            difference if difference <= self.tolerance => self.contenders.push(contender),
            difference => eprintln!(
                "  skipped {}: its result differs from ours by {difference:.1e} of the largest number",
                contender.name
            ),
        }
    }

    fn add_python(&mut self, python: &Environment, script: Script, variants: &[&str], case: &Case) {
        // Only ggml has 8-bit keys and values.
        if case.dtype == "int8" && script != Script::Ggml {
            return;
        }
        for variant in variants {
            if let Some(contender) = python.contender(script, case, variant) {
                self.add(contender);
            }
        }
    }
}

/// The largest difference, as a share of the largest number; NaN if the lengths differ.
fn difference(expected: &[f32], found: &[f32]) -> f32 {
    if expected.len() != found.len() {
        return f32::NAN;
    }
    let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    // `max` would ignore NaN.
    let worst = expected
        .iter()
        .zip(found)
        .map(|(a, b)| (a - b).abs())
        .fold(0f32, |worst, x| if worst.is_nan() || x <= worst { worst } else { x });
    worst / largest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differing_results_are_detected() {
        assert_eq!(difference(&[1.0, -2.0], &[1.0, -2.0]), 0.0);
        assert_eq!(difference(&[1.0, -2.0], &[1.0, -1.0]), 0.5);
        assert!(difference(&[1.0], &[1.0, 2.0]).is_nan());
        assert!(difference(&[1.0, 1.0], &[f32::NAN, 1.0]).is_nan());
    }
}
