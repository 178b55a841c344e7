//! How many tokens does the memory hold while the demand moves from long sequences to short ones?

use std::collections::VecDeque;

use anyhow::{Context, Result};
use benches::Record;

use crate::demand::{CHUNK, Demand};
use crate::memory::{Memory, Sequence};
use crate::model::Model;

/// What one replay of the arrivals has shown.
struct Replay {
    /// The tokens held at the last refusal so far, averaged over time. An arrival is a step of time: it is the one clock
    /// that all memories have in common, because the number of refusals depends on the memory.
    held: f64,
    /// The most units of real memory that the blocks had.
    resident: usize,
}

/// Compares the one budget with the best of all fixed splits that can hold a long sequence. The best one is chosen with
/// hindsight: it is simulated for the same arrivals.
pub(crate) fn from_long_to_short(model: &Model, demand: &Demand, record: &mut Record) -> Result<()> {
    const CASE: &str = "budget/shift";
    let units = demand.bytes / model.bytes_of_unit();
    let lengths = arrivals(demand);
    let shared = replay(&Memory::shared(model.grouped(units)?), &lengths)?;
    let shared = shared.context("the budget does not hold a long sequence")?;
    let mut best: Option<f64> = None;
    for split in Memory::splits(model, units) {
        if let Some(Replay { held, .. }) = replay(&split?, &lengths)? {
            best = Some(best.map_or(held, |best| best.max(held)));
        }
    }
    let best = best.context("no split of the budget holds a long sequence")?;
    record.value(CASE, "tokens", shared.held, "");
    record.value(CASE, "of_best_split", shared.held / best, "");
    record.value(CASE, "resident", shared.resident as f64 / units as f64, "");
    Ok(())
}

/// The lengths of the sequences that arrive. The share of long ones falls from 1 to 0.
pub(crate) fn arrivals(demand: &Demand) -> Vec<usize> {
    let all = demand.arrivals;
    let mut random = random();
    let is_long = |at| random() * (all as f64) >= at as f64;
    (0..all).map(is_long).map(|is_long| if is_long { demand.long } else { demand.short }).collect()
}

/// Numbers from 0 to 1, the same ones in every run: SplitMix64 with a fixed seed.
fn random() -> impl FnMut() -> f64 {
    let mut state = 7u64;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Computes the sequences one after another. Each one stays until a later one is refused room; then the oldest one ends.
/// So the memory is always full. `None` if a sequence does not fit in it alone.
fn replay(memory: &Memory, lengths: &[usize]) -> Result<Option<Replay>> {
    let mut sequences = VecDeque::<Sequence>::new();
    let mut held_by_others = 0;
    let mut at_refusal = None;
    let (mut sum, mut arrivals) = (0, 0);
    let mut resident = 0;
    for &tokens in lengths {
        let mut sequence = Sequence::new(memory);
        while sequence.len() < tokens {
            if sequence.grow(CHUNK.min(tokens - sequence.len()))? {
                resident = resident.max(memory.resident());
                continue;
            }
            at_refusal = Some(held_by_others + sequence.len());
            let Some(oldest) = sequences.pop_front() else { return Ok(None) };
            held_by_others -= oldest.len();
        }
        held_by_others += sequence.len();
        sequences.push_back(sequence);
        // Nothing counts before the memory is full for the first time.
        if let Some(held) = at_refusal {
            sum += held;
            arrivals += 1;
        }
    }
    Ok(Some(Replay { held: sum as f64 / arrivals as f64, resident }))
}
