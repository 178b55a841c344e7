//! Prints what is published, one batch in hexadecimal per line: for programs in other languages that decode it.

use std::error::Error;
use std::ops::Range;

use block_pool::{BlockPool, PoolGroup, Salt, Window};
use block_table::{BlockTable, TableOptions};
use kv_events::{Event, EventBatch, Medium, Translator};

/// Computes a sequence of these tokens, which stays cached.
fn compute(pool: &BlockPool, options: &TableOptions, tokens: Range<u32>) -> Result<(), Box<dyn Error>> {
    let mut table = BlockTable::with_options(pool, options);
    table.reserve(tokens.len())?;
    table.commit_tokens(&tokens.collect::<Vec<_>>())?;
    Ok(())
}

fn print(events: Vec<Event>, rank: Option<u32>) {
    let batch = EventBatch { data_parallel_rank: rank, ..EventBatch::now(events) };
    println!("{}", batch.encode().iter().map(|byte| format!("{byte:02x}")).collect::<String>());
}

fn main() -> Result<(), Box<dyn Error>> {
    // Two full blocks of 16 tokens; the last token is in a block that is not full.
    let pool = BlockPool::new(4, 16)?;
    let (mut events, mut translator) = (pool.subscribe(), Translator::of(&pool));
    compute(&pool, &TableOptions::default(), 100_000..100_033)?;
    print(translator.translate(events.try_iter()), None);
    // The same tokens with a salt need three blocks, so one of the two is evicted.
    compute(&pool, &TableOptions::default().salt(Salt::new(b"tenant")), 100_000..100_033)?;
    print(translator.translate(events.try_iter()), None);
    pool.reset_prefix_cache();
    print(translator.translate(events.try_iter()), None);

    // A layer that sees all tokens, and one with a window; in host memory, as the third engine of several.
    let groups = [PoolGroup::new(1), PoolGroup::new(1).span(Window::new(8))];
    let pool = BlockPool::of_groups(8, 4, &groups)?;
    compute(&pool, &TableOptions::default(), 0..4)?;
    let mut translator = Translator::of(&pool).medium(Medium::Cpu);
    print(translator.translate(pool.subscribe().try_iter()), Some(2));
    Ok(())
}
