//! A model whose layers differ, as in Gemma and gpt-oss: some see all tokens, others a window. Each kind is a group.

mod toy_model;

use paged_attention::{KvCache, LayerGroup, Window};
use toy_model::{HEAD_DIM, KV_HEADS, ToyModel};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = ToyModel::new(6)?;
    // Every third layer sees all tokens.
    let is_full = |layer: &usize| layer % 3 == 2;
    let full = LayerGroup::new((0..6).filter(is_full), KV_HEADS, HEAD_DIM);
    let windowed = LayerGroup::new((0..6).filter(|layer| !is_full(layer)), KV_HEADS, HEAD_DIM).window(Window::new(32));
    // Both share one memory, whatever they use it for. Sizes are given in bytes, or in blocks of all layers.
    let cache = KvCache::builder_of([full, windowed]).block_size(8).memory(4 << 20).build()?;

    // Nothing else changes: one table for a sequence, one `attend` for each layer.
    let mut table = cache.table();
    let mut next: Vec<u32> = (0..60).map(|i| i * 5 % 90).collect();
    for _ in 0..100 {
        let mut step = cache.step();
        step.push(&mut table, &next)?;
        next = model.forward(&step)?;
        step.commit()?;
    }
    let blocks = [0, 1].map(|group| table.blocks_of_group(group).len());
    println!("{} tokens: {} blocks of the layers that see all, {} of the others", table.len(), blocks[0], blocks[1]);
    assert_eq!(blocks, [20, 4]); // 159 tokens in blocks of 8; 31 of them and the next one
    Ok(())
}
