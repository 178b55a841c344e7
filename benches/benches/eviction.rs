//! The time to evict a block, for small and large pools and so for short and long chains of blocks.
//!
//! A sequence with a window frees each block that the window has passed. These blocks stay cached and form a long chain
//! of evictable blocks. Small and large pools take turns, so that other load on the machine disturbs both alike.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use benches::{Record, is_smoke_test, median};
use paged_attention::{BlockPool, BlockTable, PrefixKey, TableOptions, Window};

const BLOCK_SIZE: usize = 16;
/// The sequence's window in tokens, and the tokens that it computes at a time.
const WINDOW: usize = 512;

/// A pool in which one sequence has filled all blocks: those inside its window are in use, the others are evictable.
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

/// Nanoseconds per block of one allocation of half the pool, which evicts blocks.
fn evict_half(blocks: usize) -> Result<f64> {
    let (pool, table) = passed(blocks)?;
    let half = blocks / 2;
    let started = Instant::now();
    let allocated = black_box(pool.allocate(half)?);
    let time = started.elapsed().as_nanos() as f64;
    drop((allocated, table));
    Ok(time / half as f64)
}

/// Nanoseconds to cache a new first block in a pool that already caches `others` first blocks. `first_token` decides
/// whether their first tokens are equal or differ.
fn cache_first(others: usize, first_token: impl Fn(u32) -> u32) -> Result<f64> {
    const MORE: usize = 1000;
    let pool = BlockPool::new(others + MORE, BLOCK_SIZE)?;
    let key = PrefixKey::new();
    let mut all = Vec::with_capacity(others + MORE);
    let mut cache = |at: usize| -> Result<()> {
        let scattered = (at as u32).wrapping_mul(2_654_435_761);
        let mut tokens = [7; BLOCK_SIZE];
        (tokens[0], tokens[1]) = (first_token(scattered), scattered);
        let mut blocks = pool.allocate(1)?;
        blocks.cache(&key, 0, &[], &tokens)?;
        all.push(blocks);
        Ok(())
    };
    (0..others).try_for_each(&mut cache)?;
    let started = Instant::now();
    (others..others + MORE).try_for_each(&mut cache)?;
    Ok(started.elapsed().as_nanos() as f64 / MORE as f64)
}

fn main() -> Result<()> {
    let smoke = is_smoke_test();
    let rounds = if smoke { 1 } else { 11 };
    let sizes: &[usize] = if smoke { &[200, 2000] } else { &[2000, 200_000] };
    let mut times = vec![Vec::new(); sizes.len()];
    for _ in 0..rounds {
        for (&blocks, times) in sizes.iter().zip(&mut times) {
            // About the same amount of work for each size, so that a short measurement is not dominated by noise.
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
        let scattered = (0..rounds).map(|_| cache_first(others, |x| x)).collect::<Result<Vec<_>>>()?;
        record.value(&format!("first block among {others}"), "ns_per_block", median(scattered), "ns");
        let alike = (0..rounds).map(|_| cache_first(others, |_| 1)).collect::<Result<Vec<_>>>()?;
        record.value(&format!("first block among {others}, first token the same"), "ns_per_block", median(alike), "ns");
    }
    record.write("eviction")
}
