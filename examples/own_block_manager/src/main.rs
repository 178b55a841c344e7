//! An engine that has a block manager of its own, and takes only the kernels: `reshape_and_cache` writes keys and
//! values to its slots, `paged_attention` reads its block tables. No `KvCache`, `BlockTable` or `Step` is involved.
//!
//! `cargo run --release -p own_block_manager`

mod block_manager;
mod engine;
mod model;

use anyhow::{Result, ensure};
use block_manager::BlockManager;
use engine::{Outcome, Sequence, generate};
use model::{Model, VOCABULARY};

const BLOCKS: u32 = 24;
const BLOCK_SIZE: usize = 16;

/// Prompts of different lengths, each answered with some tokens.
fn requests() -> Vec<Sequence> {
    let request = |(id, (prompt, answer)): (usize, (usize, usize))| {
        let token = |i: usize| ((i * 31 + id * 97) % VOCABULARY) as u32;
        Sequence::new(id, (0..prompt).map(token).collect(), answer)
    };
    let lengths = [(40, 30), (7, 60), (100, 20), (1, 80), (64, 40), (15, 70), (90, 90), (33, 50)];
    lengths.into_iter().enumerate().map(request).collect()
}

/// Answers these sequences in a pool of their own.
fn answer(model: &Model, blocks: u32, sequences: Vec<Sequence>) -> Result<Outcome> {
    let kv = model.blocks(blocks as usize, BLOCK_SIZE)?;
    let mut manager = BlockManager::new(blocks, BLOCK_SIZE);
    let outcome = generate(model, &kv, &mut manager, sequences)?;
    ensure!(manager.free_blocks() == blocks as usize, "blocks were lost");
    Ok(outcome)
}

/// Answers all requests in one batch, and each alone. The tokens have to be the same.
fn compare(model: &Model) -> Result<Outcome> {
    let mut together = answer(model, BLOCKS, requests())?;
    together.finished.sort_by_key(|sequence| sequence.id);
    for (sequence, request) in together.finished.iter().zip(requests()) {
        let alone = answer(model, 64, vec![request])?;
        ensure!(sequence.tokens == alone.finished[0].tokens, "sequence {} differs from itself alone", sequence.id);
    }
    Ok(together)
}

fn main() -> Result<()> {
    let outcome = compare(&Model::random()?)?;
    let tokens: usize = outcome.finished.iter().map(|sequence| sequence.tokens.len()).sum();
    println!("{} sequences, {tokens} tokens in {BLOCKS} blocks of {BLOCK_SIZE}", outcome.finished.len());
    println!("{} steps, {} preemptions; each answer is that of the sequence alone", outcome.steps, outcome.preemptions);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_those_of_each_sequence_alone() -> Result<()> {
        let outcome = compare(&Model::random()?)?;
        assert_eq!(outcome.finished.len(), requests().len());
        assert!(outcome.preemptions > 0, "the pool is too large to show preemption");
        Ok(())
    }

    #[test]
    fn a_sequence_that_does_not_fit_is_an_error() -> Result<()> {
        let model = Model::random()?;
        let error = answer(&model, 2, requests()).map(drop).map_err(|error| error.to_string());
        assert_eq!(error, Err("a prompt does not fit the pool".into()));
        let alone =
            answer(&model, 2, vec![Sequence::new(0, vec![1; 30], 5)]).map(drop).map_err(|error| error.to_string());
        assert_eq!(alone, Err("a sequence of 33 tokens does not fit the pool".into()));
        Ok(())
    }
}
