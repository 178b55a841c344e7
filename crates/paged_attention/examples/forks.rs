//! Several samples of one prompt, which is computed and stored once.

mod toy_model;

use paged_attention::{KvCache, KvShape};
use toy_model::{HEAD_DIM, KV_HEADS, ToyModel, VOCABULARY};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = ToyModel::new(2)?;
    let cache = KvCache::builder(KvShape::new(2, KV_HEADS, HEAD_DIM)).blocks(64).block_size(16).build()?;
    let prompt: Vec<u32> = (0..50).map(|i| i * 7 % 90).collect();

    let mut table = cache.table();
    let mut step = cache.step();
    step.push(&mut table, &prompt)?;
    let first = model.forward(&step)?[0];
    step.commit()?;
    assert_eq!(cache.pool().in_use(), 4); // 50 tokens in blocks of 16

    // A fork shares all blocks. The first write into the last one, which is not full, copies it.
    let mut samples: Vec<_> = (0..4).map(|_| table.fork()).collect();
    drop(table);
    assert_eq!(cache.pool().in_use(), 4);
    // Each continues with a token of its own: here any, in an engine one that is drawn.
    let mut next: Vec<u32> = (0..4).map(|i| (first + i) % VOCABULARY as u32).collect();
    let mut texts = vec![Vec::new(); 4];
    for _ in 0..8 {
        let mut step = cache.step();
        for (table, token) in samples.iter_mut().zip(&next) {
            step.push(table, &[*token])?;
        }
        let drawn = model.forward(&step)?;
        step.commit()?;
        texts.iter_mut().zip(&next).for_each(|(text, token)| text.push(*token));
        next = drawn;
    }
    println!("{texts:?}\n{} blocks for four sequences of 58 tokens", cache.pool().in_use());
    assert_eq!(cache.pool().in_use(), 3 + 4); // three full blocks of all, and one of each
    Ok(())
}
