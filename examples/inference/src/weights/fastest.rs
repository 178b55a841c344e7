//! Which kind of weights this processor multiplies fastest.

use std::fmt;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{Device, Module, Tensor};

use super::{Linear, Weights};
use crate::gguf::Gguf;
use crate::median::median;

/// Sequences that decode together in the measured products.
const ROWS: usize = 8;
/// Measured rounds, after one that is not.
const ROUNDS: usize = 5;
/// Layers whose matrices are multiplied one after the other, so that they are not all in the processor's cache.
const LAYERS: usize = 4;

/// How much of the time a kind of weights must save to be taken instead of one before it: the choice must not depend on
/// chance.
const MARGIN: f64 = 0.1;

/// The fastest kind of weights, and how many seconds the products took with each kind.
#[derive(Debug)]
pub struct Fastest {
    /// The fastest kind.
    pub weights: Weights,
    times: Vec<(Weights, f64)>,
}

/// Multiplies a few of the file's matrices with each kind of weights that fits into memory, with a model for sequences
/// of at most `longest` tokens. All have at least the quality of 8 bits, or that of the file if it
/// has fewer.
///
/// # Errors
///
/// If a tensor cannot be read, or no kind fits into memory.
pub fn fastest(gguf: &mut Gguf, longest: usize) -> Result<Fastest> {
    // In this order if they are as fast: the smallest first.
    let kinds = [Weights::Int8, Weights::F32, Weights::Stored];
    let fitting: Vec<_> = kinds.into_iter().filter(|kind| gguf.check_memory(*kind, longest).is_ok()).collect();
    if fitting.is_empty() {
        gguf.check_memory(Weights::Stored, longest)?;
    }
    let names: Vec<_> = (0..gguf.config().layers().min(LAYERS)).map(|i| gguf.config().measured_matrix(i)).collect();
    let mut matrices = Vec::new();
    for kind in fitting {
        let of_kind = names.iter().map(|name| Linear::new(gguf.tensor(name)?, None, kind));
        matrices.push((kind, of_kind.collect::<Result<Vec<_>>>()?));
    }
    let width = gguf.tensor(&names[0])?.shape().dims2()?.1;
    let x = Tensor::randn(0f32, 1.0, (ROWS, width), &Device::Cpu)?;
    let mut rounds = vec![Vec::new(); matrices.len()];
    for round in 0..=ROUNDS {
        for ((_, matrices), times) in matrices.iter().zip(&mut rounds) {
            let started = Instant::now();
            for matrix in matrices {
                matrix.forward(&x)?;
            }
            if round > 0 {
                times.push(started.elapsed().as_secs_f64());
            }
        }
    }
    let mut times: Vec<_> = matrices.iter().map(|(kind, _)| *kind).zip(rounds.into_iter().map(median)).collect();
    let first = best(&times).context("nothing was measured")?;
    times.swap(0, first);
    times[1..].sort_by(|a, b| a.1.total_cmp(&b.1));
    Ok(Fastest { weights: times[0].0, times })
}

/// The index of the first kind that no other beats by more than the margin.
fn best(times: &[(Weights, f64)]) -> Option<usize> {
    let fastest = times.iter().map(|(_, time)| *time).fold(f64::INFINITY, f64::min);
    times.iter().position(|(_, time)| time * (1.0 - MARGIN) <= fastest)
}

/// One line: what was chosen, why, and how to choose otherwise.
impl fmt::Display for Fastest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "weights: {}, the fastest here", self.weights.name())?;
        let first = self.times.first().map_or(0.0, |(_, time)| *time);
        for (i, (kind, time)) in self.times.iter().enumerate().skip(1) {
            let start = if i == 1 { " (" } else { ", " };
            write!(f, "{start}{}: {:.1} times as long", kind.name(), time / first.max(1e-9))?;
        }
        let end = if self.times.len() > 1 { ")" } else { "" };
        write!(f, "{end}; --weights exact for f32")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_little_faster_is_not_enough() {
        let times = |a, b, c| {
            let kinds = [Weights::Int8, Weights::F32, Weights::Stored];
            kinds.into_iter().zip([a, b, c].map(|time| f64::from(time) * 1e-6)).collect::<Vec<_>>()
        };
        assert_eq!(best(&times(100, 95, 91)), Some(0));
        assert_eq!(best(&times(100, 80, 75)), Some(1));
        assert_eq!(best(&times(100, 80, 50)), Some(2));
        assert_eq!(best(&[]), None);
    }
}
