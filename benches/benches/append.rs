//! Appending one token's keys and values (8 heads x 128, f32) to a long cache, compared with candle's own caches. Only
//! the append is timed, not the `truncate` or the new cache before each append.

use std::cell::RefCell;

use anyhow::Result;
use benches::{Record, Stopwatch, is_smoke_test};
use candle_core::{DType, Device, Tensor};
use candle_nn::kv_cache::{ConcatKvCache, KvCache as Contiguous};
use criterion::Criterion;
use paged_attention::{KvCache, KvShape};

const HEADS: usize = 8;
const DIM: usize = 128;

/// `(1, heads, tokens, head_dim)`, as candle's caches take them.
fn batched(tokens: usize) -> Result<Tensor> {
    Ok(Tensor::zeros((1, HEADS, tokens, DIM), DType::F32, &Device::Cpu)?)
}

fn main() -> Result<()> {
    let mut criterion = Criterion::default().configure_from_args().sample_size(20);
    let c = &mut criterion;
    let mut record = Record::default();
    let token = batched(1)?;
    let contexts: &[usize] = if is_smoke_test() { &[64] } else { &[512, 4096, 16_384] };
    for &context in contexts {
        let history = batched(context)?;

        let shape = KvShape::new(1, HEADS, DIM);
        let cache = KvCache::builder(shape).blocks(context / 16 + 64).build()?;
        let packed = |tokens| Tensor::zeros((tokens, HEADS, DIM), DType::F32, &Device::Cpu);
        let mut table = cache.table();
        let one = packed(1)?;
        // Every page is written first: the system provides a page only when it is first touched.
        let all = packed(context)?;
        let mut step = cache.step();
        step.push(&mut table, &vec![0; context])?;
        step.write(0, &all, &all)?;
        step.commit()?;
        let table = RefCell::new(table);
        let ours = Stopwatch::time_with(
            c,
            &format!("paged/{context}"),
            || table.borrow_mut().truncate(context).expect("there is no window"),
            |()| {
                let mut table = table.borrow_mut();
                let mut step = cache.step();
                step.push(&mut table, &[0]).expect("there is room");
                step.write(0, &one, &one).expect("the shapes fit");
                step.commit().expect("the layer is written");
            },
        );

        // With room for one more token, and with no room; without room the whole history is copied.
        let contiguous = |room: usize| -> Result<Contiguous> {
            let mut cache = Contiguous::new(2, context + room);
            cache.append(&history, &history)?;
            Ok(cache)
        };
        // A clone shares the memory and has its own length.
        let roomy = contiguous(1)?;
        let fits = Stopwatch::time_with(
            c,
            &format!("candle_nn KvCache/{context}"),
            || roomy.clone(),
            |cache| drop(cache.append(&token, &token).expect("the shapes fit")),
        );
        let grows = Stopwatch::time_with(
            c,
            &format!("candle_nn KvCache, full/{context}"),
            || contiguous(0).expect("the shapes fit"),
            |cache| drop(cache.append(&token, &token).expect("the shapes fit")),
        );
        let concatenated = Stopwatch::time_with(
            c,
            &format!("candle_nn ConcatKvCache/{context}"),
            || {
                let mut cache = ConcatKvCache::new(2);
                cache.append(&history, &history).expect("the shapes fit");
                cache
            },
            |cache| drop(cache.append(&token, &token).expect("the shapes fit")),
        );
        record.time(
            &format!("append 1 token at {context}"),
            ours,
            None,
            &[
                ("candle_nn KvCache", fits),
                ("candle_nn KvCache, full", grows),
                ("candle_nn ConcatKvCache", concatenated),
            ],
        );
    }
    criterion.final_summary();
    record.write("append")
}
