//! What can never be answered, refused before anything is computed.

use anyhow::{Result, ensure};
use paged_attention::KvCache;

use super::{Request, Settings};

impl Settings {
    /// Refuses settings with which nothing can be answered.
    ///
    /// # Errors
    ///
    /// If there are such.
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

/// Refuses at once what could only fail later, with a model that can have `context` tokens in a sequence.
///
/// # Errors
///
/// If a request can never be answered.
pub fn check(context: usize, cache: &KvCache, requests: &[Request], settings: &Settings) -> Result<()> {
    settings.check()?;
    let pool = cache.pool();
    for (i, Request { prompt, max_tokens }) in requests.iter().enumerate() {
        let (i, n) = (i + 1, prompt.len());
        ensure!(n > 0, "prompt {i} has no tokens");
        ensure!(*max_tokens > 0, "0 tokens of answer were asked for, at least one is needed");
        let total = n.saturating_add(*max_tokens);
        ensure!(
            total <= context,
            "prompt {i} has {n} tokens and may get {max_tokens} more, the model's context is {context} tokens"
        );
        // The last token is never computed, so it needs no slot.
        let needed = pool.blocks_for(total - 1);
        ensure!(
            needed <= pool.blocks(),
            "prompt {i} has {n} tokens and may get {max_tokens} more: that takes {needed} blocks of {} tokens, the \
             pool has {}",
            pool.block_size(),
            pool.blocks()
        );
    }
    Ok(())
}
