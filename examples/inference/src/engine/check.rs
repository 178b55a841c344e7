//! Refuses requests and settings that can never be answered, before anything is computed.

use anyhow::{Result, ensure};
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
    let pool = cache.pool();
    // Nothing of a private table is shared.
    let table = cache.table_with(&TableOptions::default().private());
    for (i, Request { prompt, max_tokens }) in requests.iter().enumerate() {
        let (i, n) = (i + 1, prompt.len());
        ensure!(n > 0, "prompt {i} has no tokens");
        ensure!(*max_tokens > 0, "0 tokens of answer were asked for, at least one is needed");
        let total = n.saturating_add(*max_tokens);
        ensure!(
            total <= context,
            "prompt {i} has {n} tokens and may get {max_tokens} more, the model's context is {context} tokens"
        );
        // The last generated token is never computed, so it needs no slot.
        let units = table.lookup_prefix_in_chunks(&vec![0; total - 1], settings.step_tokens).blocks;
        // With several groups of layers, a block here is one of each.
        let [needed, blocks] = [units, pool.units()].map(|units| units as f64 / pool.units_per_block() as f64);
        ensure!(
            units <= pool.units(),
            "prompt {i} has {n} tokens and may get {max_tokens} more: that takes {needed} blocks of {} tokens, the \
             pool has {blocks}",
            pool.block_size(),
        );
    }
    Ok(())
}
