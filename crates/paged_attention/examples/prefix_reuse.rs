//! A system prompt that is computed once. A salt keeps the prefixes of two tenants apart.

mod toy_model;

use paged_attention::{BlockTable, KvCache, KvShape, Salt, TableOptions};
use toy_model::{HEAD_DIM, KV_HEADS, ToyModel};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = ToyModel::new(2)?;
    let cache = KvCache::builder(KvShape::new(2, KV_HEADS, HEAD_DIM)).blocks(64).block_size(16).build()?;
    let system: Vec<u32> = (0..50).map(|i| i % 90).collect();

    // Computes what is not cached. Returns the next token, and how many tokens were found.
    let answer = |mut table: BlockTable, question: &[u32]| -> Result<(u32, usize), Box<dyn std::error::Error>> {
        let prompt = [&system[..], question].concat();
        let found = table.match_prefix(&prompt);
        let mut step = cache.step();
        step.push(&mut table, &prompt[found..])?;
        let next = model.forward(&step)?;
        step.commit()?; // full blocks are cached from here on
        Ok((next[0], found))
    };

    let (first, found) = answer(cache.table(), &[91, 92])?;
    assert_eq!(found, 0);
    // Blocks that nobody uses stay cached until their memory is needed.
    assert_eq!(cache.pool().in_use(), 0);
    let (second, found) = answer(cache.table(), &[91, 92])?;
    println!("{found} of 52 tokens were found, and the answer is the same: {}", first == second);
    assert!(found >= 48 && first == second);

    // Another tenant finds nothing of it: salts are compared, not hashed.
    let options = TableOptions::default().salt(Salt::new(b"another tenant"));
    let (_, found) = answer(cache.table_with(&options), &[91, 92])?;
    assert_eq!(found, 0);
    Ok(())
}
