//! A tier below the pool: prefixes that outlive their blocks, or the process.

use std::sync::Arc;

use paged_attention::{BlockTable, FetchLimits, KvCache, Offload, OffloadOptions, OffloadStats, Tier};

use crate::error::Result;
use crate::{KvError, PagedKVPool};

/// The tier of a pool, and the thread that stores blocks there.
#[derive(Debug)]
pub(crate) struct Below {
    tier: Arc<dyn Tier>,
    limits: FetchLimits,
    cache: KvCache,
    offload: Offload,
}

impl Below {
    /// How many of `tokens` the tier seems to have.
    pub(crate) fn lookup(&self, tokens: &[u32], table: impl FnOnce(&KvCache) -> BlockTable) -> usize {
        table(&self.cache).lookup_tier(&*self.tier, tokens)
    }

    /// A table with what the pool and the tier have of `tokens`, if that is more than `matched` tokens.
    pub(crate) fn longer(
        &self,
        matched: usize,
        tokens: &[u32],
        table: impl FnOnce(&KvCache) -> BlockTable,
    ) -> Option<(KvCache, BlockTable)> {
        let mut table = table(&self.cache);
        table.match_prefix(tokens);
        let fetched = table.fetch(&*self.tier, tokens, &self.limits);
        // What does not fit is computed.
        table.insert(&fetched).ok();
        (table.len() > matched).then(|| (self.cache.clone(), table))
    }
}

impl PagedKVPool {
    /// Has blocks of prefixes go to a tier below the pool, for example a file: those that are evicted, and with
    /// [`OffloadOptions::write_through`] all that are cached. From now on [`PagedKVCache::match_prefix`] and
    /// [`PagedKVCache::begin_pass`] also find what the tier has, and read it within `limits`. Call it before the first
    /// cache is made.
    ///
    /// A tier finds blocks of this pool by their tokens, and needs a name for everything else that they depend on: the
    /// model's weights, its rotary parameters, and [`block_identity`](Self::block_identity).
    ///
    /// [`PagedKVCache::match_prefix`]: crate::PagedKVCache::match_prefix
    /// [`PagedKVCache::begin_pass`]: crate::PagedKVCache::begin_pass
    ///
    /// # Errors
    ///
    /// [`KvError::Options`] when the pool has a tier already, or can grow, or no thread can be started.
    pub fn use_tier(&self, tier: Arc<dyn Tier>, options: &OffloadOptions, limits: FetchLimits) -> Result<()> {
        let caches = self.0.recent.all();
        let (false, Some(cache)) = (self.0.recent.grows(), caches.into_iter().next()) else {
            return Err(KvError::Options("a pool that can grow has no tier".into()));
        };
        let offload = cache.pool().offload_to(tier.clone(), options);
        let offload = offload.map_err(|error| KvError::Options(error.to_string()))?;
        let below = Below { tier, limits, cache, offload };
        self.0.below.set(below).map_err(|_| KvError::Options("the pool has a tier already".into()))
    }

    /// What the bytes of a block depend on, besides the model and its rotary parameters. Blocks of two pools with equal
    /// strings can be exchanged.
    pub fn block_identity(&self) -> String {
        self.0.recent.all().first().map(KvCache::block_identity).unwrap_or_default()
    }

    /// The bytes of a block for new tokens, all layers together.
    pub fn bytes_per_block(&self) -> usize {
        self.0.recent.all().first().map_or(0, KvCache::bytes_per_block)
    }

    /// What has become of the blocks that were to go to the tier, if there is one.
    pub fn offload_stats(&self) -> Option<OffloadStats> {
        self.0.below.get().map(|below| below.offload.stats())
    }

    /// Waits until no block waits for the tier.
    pub fn flush_offload(&self) {
        self.0.below.get().iter().for_each(|below| below.offload.flush());
    }
}
