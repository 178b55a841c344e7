//! An endless sequence in constant memory: a sliding window, and the first tokens, which stay (attention sinks).

mod toy_model;

use paged_attention::{KvCache, KvShape, TableOptions, Window};
use toy_model::{HEAD_DIM, KV_HEADS, ToyModel};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = ToyModel::new(2)?;
    let cache = KvCache::builder(KvShape::new(2, KV_HEADS, HEAD_DIM)).blocks(16).block_size(8).build()?;
    // A token sees itself, the 31 before it, and the first 4 of the sequence.
    let window = Window::new(32).with_sink_tokens(4);
    let mut table = cache.table_with(&TableOptions::default().window(window));

    let mut next = vec![1, 2, 3];
    let mut most = 0;
    for _ in 0..500 {
        let mut step = cache.step();
        step.push(&mut table, &next)?;
        next = model.forward(&step)?;
        step.commit()?; // blocks that the window has passed are freed here
        most = most.max(cache.pool().in_use());
    }
    println!("{} tokens, never more than {most} blocks of 8", table.len());
    // 502 tokens would be 63 blocks. A window of 32 lies in five blocks at most, the sink tokens in one.
    assert_eq!((table.len(), most), (502, 6));
    Ok(())
}
