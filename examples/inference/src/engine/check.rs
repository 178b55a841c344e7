//! Refuses requests and settings that can never be answered, before anything is computed.

use anyhow::{Result, bail, ensure};
use paged_attention::{KvCache, TableOptions};

use super::{Request, Settings};

impl Settings {
    /// Refuses settings with which nothing can be answered.
    ///
    /// # Errors
    ///
    /// If `samples` is 0 or more than `max_batch`, or if `step_tokens` is 0.
    pub fn check(&self) -> Result<()> {
        ensure!(self.samples > 0, "0 samples were asked for, at least one answer is needed");
        ensure!(
            self.samples <= self.max_batch,
            "{} samples of a prompt do not fit into a batch of {}",
            self.samples,
            self.max_batch
        );
        ensure!(self.step_tokens > 0, "a step of 0 tokens computes nothing");
        Ok(())
    }
}

/// Refuses requests that would fail later, with a model that can have `context` tokens in a sequence.
///
/// # Errors
///
/// If the settings are refused, or if a request has no tokens, asks for 0 tokens, or does not fit into the context or
/// the pool.
pub fn check(context: usize, cache: &KvCache, requests: &[Request], settings: &Settings) -> Result<()> {
    settings.check()?;
    for (request, i) in requests.iter().zip(1..) {
        if let Some(reason) = why_never(context, cache, request, settings.step_tokens) {
            bail!("prompt {i} {reason}");
        }
    }
    Ok(())
}

/// Why a request can never be answered, with a model that can have `context` tokens in a sequence: how a sentence goes on
/// that begins with "the prompt". `None` if it can be.
pub fn why_never(context: usize, cache: &KvCache, request: &Request, step_tokens: usize) -> Option<String> {
    let (pool, Request { prompt, max_tokens }) = (cache.pool(), request);
    let n = prompt.len();
    if n == 0 {
        return Some("has no tokens".into());
    }
    if *max_tokens == 0 {
        return Some("may get 0 tokens of answer, at least one is needed".into());
    }
    let total = n.saturating_add(*max_tokens);
    if total > context {
        return Some(format!("has {n} tokens and may get {max_tokens} more, the model's context is {context} tokens"));
    }
    // Nothing of a private table is shared.
    let table = cache.table_with(&TableOptions::default().private());
    // The last generated token is never computed, so it needs no slot.
    let units = table.lookup_prefix_in_chunks(&vec![0; total - 1], step_tokens).blocks;
    // With several groups of layers, a block here is one of each.
    let [needed, blocks] = [units, pool.units()].map(|units| units as f64 / pool.units_per_block() as f64);
    (units > pool.units()).then(|| {
        format!(
            "has {n} tokens and may get {max_tokens} more: that takes {needed} blocks of {} tokens, the pool has {blocks}",
            pool.block_size()
        )
    })
}
