//! Continuous batching: sequences join when there are blocks for them, and the last one yields when there are none.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use candle_core::{D, Device, Tensor};
use paged_attention::KvLayer;

use crate::block_manager::BlockManager;
use crate::model::{Batch, Model};

/// A prompt and its answer so far.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    /// Its number, by which the block manager knows it.
    pub(crate) id: usize,
    /// All tokens.
    pub(crate) tokens: Vec<u32>,
    /// How many of them have keys and values in blocks.
    computed: usize,
    /// How many it has when it ends.
    length: usize,
}

impl Sequence {
    /// A prompt that is answered with `answer` tokens.
    pub(crate) fn new(id: usize, prompt: Vec<u32>, answer: usize) -> Self {
        Self { id, length: prompt.len() + answer, tokens: prompt, computed: 0 }
    }
}

/// What happened.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// The sequences in the order in which they ended.
    pub(crate) finished: Vec<Sequence>,
    /// Forward passes.
    pub(crate) steps: usize,
    /// How often a sequence lost its blocks and was computed again.
    pub(crate) preemptions: usize,
}

/// Answers all sequences, in one batch, in these blocks.
///
/// # Errors
///
/// If a sequence does not fit the pool even alone, or the model fails.
pub(crate) fn generate(
    model: &Model,
    kv: &[KvLayer],
    manager: &mut BlockManager,
    waiting: Vec<Sequence>,
) -> Result<Outcome> {
    let mut waiting: VecDeque<Sequence> = waiting.into();
    let (mut running, mut outcome): (Vec<Sequence>, _) = (Vec::new(), Outcome::default());
    while !(waiting.is_empty() && running.is_empty()) {
        // Every running sequence needs a slot for its next token; the last ones yield to the first.
        let mut at = 0;
        while at < running.len() {
            if manager.grow(running[at].id, running[at].tokens.len()) {
                at += 1;
                continue;
            }
            ensure!(running.len() > 1, "a sequence of {} tokens does not fit the pool", running[at].tokens.len());
            let mut last = running.remove(running.len() - 1);
            manager.free(last.id);
            last.computed = 0;
            waiting.push_front(last);
            outcome.preemptions += 1;
        }
        while waiting.front().is_some_and(|next| manager.grow(next.id, next.tokens.len())) {
            running.extend(waiting.pop_front());
        }
        ensure!(!running.is_empty(), "a prompt does not fit the pool");

        let logits = model.forward(kv, &batch(manager, &running)?)?;
        outcome.steps += 1;
        for (sequence, token) in running.iter_mut().zip(logits.argmax(D::Minus1)?.to_vec1::<u32>()?) {
            sequence.computed = sequence.tokens.len();
            sequence.tokens.push(token);
        }
        for ended in running.extract_if(.., |sequence| sequence.tokens.len() == sequence.length) {
            manager.free(ended.id);
            outcome.finished.push(ended);
        }
    }
    Ok(outcome)
}

/// The tables of one step, as tensors: of each sequence the tokens that are not computed yet.
fn batch(manager: &BlockManager, running: &[Sequence]) -> Result<Batch> {
    let (mut ids, mut positions, mut slots, mut last_rows) = (vec![], vec![], vec![], vec![]);
    for sequence in running {
        for position in sequence.computed..sequence.tokens.len() {
            ids.push(sequence.tokens[position]);
            positions.push(position as u32);
            slots.push(manager.slot(sequence.id, position));
        }
        last_rows.push(ids.len() as u32 - 1);
    }
    let numbers: Vec<usize> = running.iter().map(|sequence| sequence.id).collect();
    let (tables, width) = manager.padded_tables(&numbers);
    let of_each = |number: fn(&Sequence) -> usize| running.iter().map(|it| number(it) as u32).collect::<Vec<_>>();
    let device = &Device::Cpu;
    Ok(Batch {
        token_ids: Tensor::new(ids, device)?,
        positions: Tensor::new(positions, device)?,
        slot_mapping: Tensor::new(slots, device)?,
        block_tables: Tensor::from_vec(tables, (running.len(), width), device)?,
        context_lens: Tensor::new(of_each(|it| it.tokens.len()), device)?,
        query_lens: Tensor::new(of_each(|it| it.tokens.len() - it.computed), device)?,
        last_rows: Tensor::new(last_rows, device)?,
    })
}
