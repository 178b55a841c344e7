//! More sequences than the pool has room for: a step leaves out those that get no block, and when it would be empty, one
//! sequence is preempted.

mod toy_model;

use std::collections::VecDeque;

use paged_attention::{BlockTable, KvCache, KvShape, PushError, preemption_victim};
use toy_model::{HEAD_DIM, KV_HEADS, ToyModel};

const BLOCK: usize = 4;

struct Sequence {
    table: BlockTable,
    tokens: Vec<u32>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = ToyModel::new(2)?;
    let cache = KvCache::builder(KvShape::new(2, KV_HEADS, HEAD_DIM)).blocks(14).block_size(BLOCK).build()?;
    let mut waiting: VecDeque<Vec<u32>> = (0..6).map(|i| (10 * i..10 * i + 8).collect()).collect();
    let (mut running, mut ended, mut preemptions) = (Vec::new(), Vec::new(), 0);
    while ended.len() < 6 {
        // A sequence starts if it leaves a block for each of those that run.
        while let Some(tokens) = waiting.pop_front() {
            if cache.pool().available() < tokens.len() / BLOCK + 1 + running.len() {
                waiting.push_front(tokens);
                break;
            }
            let mut table = cache.table();
            table.match_prefix(&tokens); // of a preempted sequence, what is still cached
            running.push(Sequence { table, tokens });
        }
        let mut step = cache.step();
        let mut pushed = Vec::new();
        for (i, Sequence { table, tokens }) in running.iter_mut().enumerate() {
            let computed = table.len();
            match step.push(table, &tokens[computed..]) {
                Ok(()) => pushed.push(i),
                Err(PushError::OutOfBlocks(_)) => {} // nothing has changed: it is left out of this step
                Err(error) => return Err(error.into()),
            }
        }
        if pushed.is_empty() {
            drop(step); // it borrows the tables until then
            let victim = preemption_victim(running.iter().map(|sequence| sequence.table.len()));
            waiting.push_front(running.remove(victim.ok_or("a prompt is larger than the pool")?).tokens);
            preemptions += 1;
            continue;
        }
        let next = model.forward(&step)?;
        step.commit()?;
        pushed.into_iter().zip(next).for_each(|(i, token)| running[i].tokens.push(token));
        ended.extend(running.extract_if(.., |sequence| sequence.tokens.len() == 40).map(|sequence| sequence.tokens));
    }
    assert!(preemptions > 0 && cache.pool().in_use() == 0);
    println!("{} sequences of 40 tokens, 14 blocks of {BLOCK}: {preemptions} preemptions", ended.len());
    Ok(())
}
