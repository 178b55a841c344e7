//! Several sequences in one batch, which join and leave it at any step.

mod toy_model;

use paged_attention::{BlockTable, KvCache, KvShape};
use toy_model::{HEAD_DIM, KV_HEADS, ToyModel};

struct Sequence {
    table: BlockTable,
    /// The prompt and what was generated. What the table does not have yet is to be computed.
    tokens: Vec<u32>,
    longest: usize,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = ToyModel::new(2)?;
    let cache = KvCache::builder(KvShape::new(2, KV_HEADS, HEAD_DIM)).blocks(64).block_size(16).build()?;
    let mut waiting = vec![vec![1; 40], vec![2, 3], vec![4, 5, 6]];
    let mut running: Vec<Sequence> = Vec::new();

    for step_number in 0.. {
        // A new sequence joins in every second step.
        if step_number % 2 == 0 {
            running.extend(waiting.pop().map(|tokens| {
                let longest = tokens.len() + 10;
                Sequence { table: cache.table(), tokens, longest }
            }));
        }
        if running.is_empty() {
            break;
        }
        // Prompts and single tokens are rows of one step. An error of `push` (a full pool) changes nothing.
        let mut step = cache.step();
        for Sequence { table, tokens, .. } in &mut running {
            let computed = table.len();
            step.push(table, &tokens[computed..])?;
        }
        let next = model.forward(&step)?;
        step.commit()?;
        for (sequence, token) in running.iter_mut().zip(next) {
            sequence.tokens.push(token);
        }
        // The blocks of a sequence are freed when its table is dropped.
        running.retain(|sequence| {
            let goes_on = sequence.tokens.len() < sequence.longest;
            if !goes_on {
                println!("step {step_number}: {:?}", &sequence.tokens[sequence.tokens.len() - 10..]);
            }
            goes_on
        });
    }
    assert_eq!(cache.pool().in_use(), 0);
    Ok(())
}
