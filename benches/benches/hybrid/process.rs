//! The memory of the process while the demand moves from long sequences to short ones, with real tensors.
//!
//! The layers are those of Gemma 3 27B in number and span, with heads so small that a layer's block is one page of
//! memory. (Larger blocks are several pages.)

use std::collections::VecDeque;
use std::fs;

use anyhow::Result;
use benches::{Record, is_smoke_test};
use candle_core::{DType, Device, Tensor};
use paged_attention::{BlockTable, KvCache, KvDtype, LayerGroup, PushError, TableOptions, Window};

use crate::demand::{CHUNK, Demand};
use crate::model::BLOCK_SIZE;
use crate::shift;

/// 62 layers, of which every sixth sees all tokens, and the first four after the last of those do not.
const LAYERS: usize = 62;

const KV_HEADS: usize = 1;
const HEAD_DIM: usize = 64;

/// Records the most memory that the process had in addition to what it had before, over the budget of the cache.
/// Sequences end, the oldest first, when a later one has no room. Without the system's count of pages there is no row.
pub(crate) fn memory_of_the_process(record: &mut Record) -> Result<()> {
    let Some(before) = resident_bytes() else { return Ok(()) };
    let demand = if is_smoke_test() {
        Demand { bytes: 16 << 20, long: 1024, short: 64, arrivals: 6 }
    } else {
        Demand { bytes: 128 << 20, long: 16_384, short: 300, arrivals: 200 }
    };
    let bytes = demand.bytes;
    let is_full = |layer: &usize| layer % 6 == 5;
    let full = LayerGroup::new((0..LAYERS).filter(is_full), KV_HEADS, HEAD_DIM);
    let windowed =
        LayerGroup::new((0..LAYERS).filter(|layer| !is_full(layer)), KV_HEADS, HEAD_DIM).window(Window::new(1024));
    let cache = KvCache::builder_of([windowed, full]).memory(bytes).block_size(BLOCK_SIZE).dtype(KvDtype::Bf16);
    let cache = cache.build()?;
    let mut sequences = VecDeque::<BlockTable>::new();
    let mut most = 0;
    for tokens in shift::arrivals(&demand) {
        let mut table = cache.table_with(&TableOptions::default().private());
        while table.len() < tokens {
            let n = CHUNK.min(tokens - table.len());
            if !compute(&cache, &mut table, n)? && sequences.pop_front().is_none() {
                anyhow::bail!("a sequence of {tokens} tokens does not fit into {bytes} bytes");
            }
        }
        sequences.push_back(table);
        most = most.max(resident_bytes().unwrap_or(0).saturating_sub(before));
    }
    record.value("budget/shift", "process_memory", most as f64 / bytes as f64, "");
    Ok(())
}

/// Computes the next `n` tokens of a sequence. Returns whether there was room for them.
fn compute(cache: &KvCache, table: &mut BlockTable, n: usize) -> Result<bool> {
    let mut step = cache.step();
    match step.push(table, &vec![0; n]) {
        Ok(()) => {}
        Err(PushError::OutOfBlocks(_)) => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    let kv = Tensor::ones((n, KV_HEADS, HEAD_DIM), DType::BF16, &Device::Cpu)?;
    (0..LAYERS).try_for_each(|layer| step.write(layer, &kv, &kv))?;
    step.commit()?;
    Ok(true)
}

/// The memory that the process has in bytes, according to the system.
fn resident_bytes() -> Option<usize> {
    /// In `/proc/self/smaps_rollup` numbers are in this unit.
    const KIB: usize = 1024;
    let text = fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let line = text.lines().find(|line| line.starts_with("Rss:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * KIB)
}
