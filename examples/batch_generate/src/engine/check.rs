//! What can never be answered, refused before anything is computed.

use anyhow::{Result, ensure};
use paged_attention::KvCache;

use super::{LanguageModel, Request, Settings};

/// Refuses at once what could only fail later.
pub(super) fn check(
    model: &impl LanguageModel,
    cache: &KvCache,
    requests: &[Request],
    settings: &Settings,
) -> Result<()> {
    ensure!(settings.samples > 0, "0 samples were asked for, at least one answer is needed");
    ensure!(
        settings.samples <= settings.max_batch,
        "{} samples of a prompt do not fit into a batch of {}",
        settings.samples,
        settings.max_batch
    );
    ensure!(settings.step_tokens > 0, "a step of 0 tokens computes nothing");
    let pool = cache.pool();
    for (i, Request { prompt, max_tokens }) in requests.iter().enumerate() {
        let (i, n) = (i + 1, prompt.len());
        ensure!(n > 0, "prompt {i} has no tokens");
        ensure!(*max_tokens > 0, "0 tokens of answer were asked for, at least one is needed");
        let total = n.saturating_add(*max_tokens);
        ensure!(
            total <= model.context(),
            "prompt {i} has {n} tokens and may get {max_tokens} more, the model's context is {} tokens",
            model.context()
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
