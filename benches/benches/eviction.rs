//! What it takes to evict a block, whatever the size of the pool and the length of the chain that it is in.
//!
//! Windows leave long chains of blocks that nobody holds, one for each block of tokens that they have passed. Small and
//! large pools take turns, so that what else the machine does meets both.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use benches::{Record, is_smoke_test};
use paged_attention::{BlockPool, BlockTable, PrefixKey, TableOptions, Window};

const BLOCK_SIZE: usize = 16;
/// Tokens that a sequence looks back, and that it computes at a time.
const WINDOW: usize = 512;

/// A pool whose blocks are all in use or passed by a window: of one sequence, whose chain they are.
fn passed(blocks: usize) -> Result<(BlockPool, BlockTable)> {
    let pool = BlockPool::new(blocks, BLOCK_SIZE)?;
    let mut table = BlockTable::with_options(&pool, &TableOptions::default().window(Window::new(WINDOW)));
    let tokens: Vec<u32> = (0..(blocks * BLOCK_SIZE) as u32).collect();
    for piece in tokens.chunks(WINDOW) {
        table.reserve(piece.len())?;
        table.commit_tokens(piece)?;
    }
    Ok((pool, table))
}

/// Nanoseconds for each block of one allocation of half the pool.
fn evict_half(blocks: usize) -> Result<f64> {
    let (pool, table) = passed(blocks)?;
    let half = blocks / 2;
    let started = Instant::now();
    let taken = black_box(pool.take(half)?);
    let time = started.elapsed().as_nanos() as f64;
    drop((taken, table));
    Ok(time / half as f64)
}

/// Nanoseconds for a new first block in a pool that has as many others, whose first tokens are the same or differ.
fn store_first(others: usize, first_token: impl Fn(u32) -> u32) -> Result<f64> {
    const MORE: usize = 1000;
    let pool = BlockPool::new(others + MORE, BLOCK_SIZE)?;
    let key = PrefixKey::new();
    let mut all = Vec::with_capacity(others + MORE);
    let mut store = |at: usize| -> Result<()> {
        let scattered = (at as u32).wrapping_mul(2_654_435_761);
        let mut tokens = [7; BLOCK_SIZE];
        (tokens[0], tokens[1]) = (first_token(scattered), scattered);
        let mut blocks = pool.take(1)?;
        blocks.store(&key, 0, &[], &tokens);
        all.push(blocks);
        Ok(())
    };
    (0..others).try_for_each(&mut store)?;
    let started = Instant::now();
    (others..others + MORE).try_for_each(&mut store)?;
    Ok(started.elapsed().as_nanos() as f64 / MORE as f64)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() -> Result<()> {
    let smoke = is_smoke_test();
    let rounds = if smoke { 1 } else { 11 };
    let sizes: &[usize] = if smoke { &[200, 2000] } else { &[2000, 200_000] };
    let mut times = vec![Vec::new(); sizes.len()];
    for _ in 0..rounds {
        for (&blocks, times) in sizes.iter().zip(&mut times) {
            // About as much work for each size, so that a short one is no accident.
            let repeats = if smoke { 1 } else { (40_000 / blocks).max(1) };
            let all = (0..repeats).map(|_| evict_half(blocks)).collect::<Result<Vec<_>>>()?;
            times.push(median(all));
        }
    }
    let mut record = Record::default();
    for (blocks, times) in sizes.iter().zip(times) {
        record.value(&format!("window/{blocks}"), "ns_per_block", median(times), "ns");
    }
    let others: &[usize] = if smoke { &[100] } else { &[10_000, 100_000] };
    for &others in others {
        let scattered = (0..rounds).map(|_| store_first(others, |x| x)).collect::<Result<Vec<_>>>()?;
        record.value(&format!("first block among {others}"), "ns_per_block", median(scattered), "ns");
        let alike = (0..rounds).map(|_| store_first(others, |_| 1)).collect::<Result<Vec<_>>>()?;
        record.value(&format!("first block among {others}, first token the same"), "ns_per_block", median(alike), "ns");
    }
    record.write("eviction")
}
