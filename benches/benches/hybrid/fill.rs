//! How many tokens fit before the first one is refused?

use anyhow::{Context, Result};
use benches::Record;

use crate::demand::{CHUNK, Demand};
use crate::memory::{Memory, Sequence};
use crate::model::Model;

/// Sequences of `tokens` tokens arrive until one is refused. The one budget is compared with the best of all fixed
/// splits, each of which is simulated with a pool for each group.
pub(crate) fn until_refused(
    model: &Model,
    demand: &Demand,
    case: &str,
    tokens: usize,
    record: &mut Record,
) -> Result<()> {
    let units = demand.bytes / model.bytes_of_unit();
    let held = fill(&Memory::shared(model.grouped(units)?), tokens)?;
    let mut best = None;
    for split in Memory::splits(model, units) {
        best = best.max(Some(fill(&split?, tokens)?));
    }
    let best = best.context("the budget is too small to split")?;
    record.value(case, "tokens", held as f64, "");
    record.value(case, "of_best_split", held as f64 / best as f64, "");
    Ok(())
}

/// The tokens that are held at the first refusal, those of the refused sequence included.
fn fill(memory: &Memory, tokens: usize) -> Result<usize> {
    let mut sequences = Vec::new();
    loop {
        let mut sequence = Sequence::new(memory);
        while sequence.len() < tokens {
            if !sequence.grow(CHUNK.min(tokens - sequence.len()))? {
                return Ok(sequences.len() * tokens + sequence.len());
            }
        }
        sequences.push(sequence);
    }
}
