//! The pool's counters for the `metrics` facade.

use metrics::{Key, Label, Level, Metadata};

use crate::BlockPool;

static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

/// Reports a pool to the recorder that the process has installed for the [`metrics`](https://docs.rs/metrics) facade.
///
/// | name | kind | |
/// |---|---|---|
/// | `kv_cache_blocks` | gauge | labelled `state`: `free`, `in_use` or `evictable`; with several groups, in units |
/// | `kv_cache_queried_tokens` | counter | tokens for which a cached prefix was searched |
/// | `kv_cache_hit_tokens` | counter | tokens of these that matched |
/// | `kv_cache_evictions` | counter | cached blocks that were evicted |
/// | `kv_cache_copies` | counter | blocks copied before a write |
///
/// [`new`](Self::new) builds the metrics' keys once, so that without a recorder a report only reads the pool's
/// counters.
#[derive(Debug)]
pub struct PoolMetrics {
    blocks: [Key; 3],
    counters: [Key; 4],
}

impl PoolMetrics {
    /// Reports under the label `cache`, because a process may have several caches.
    pub fn new(cache: &str) -> Self {
        let label = || Label::new("cache", cache.to_owned());
        let blocks = ["free", "in_use", "evictable"]
            .map(|state| Key::from_parts("kv_cache_blocks", vec![label(), Label::from_static_parts("state", state)]));
        let counters = ["kv_cache_queried_tokens", "kv_cache_hit_tokens", "kv_cache_evictions", "kv_cache_copies"]
            .map(|name| Key::from_parts(name, vec![label()]));
        Self { blocks, counters }
    }

    /// Reports the state of `pool`. A `Step` of `paged_attention` does this when it ends.
    pub fn record(&self, pool: &BlockPool) {
        let (free, evictable, stats) = {
            let ledger = pool.ledger();
            (ledger.free_units(), ledger.evictable(), ledger.stats())
        };
        let blocks = [free, pool.blocks() - free - evictable, evictable];
        let counters = [stats.queried_tokens, stats.hit_tokens, stats.evictions, stats.copies];
        metrics::with_recorder(|recorder| {
            for (key, blocks) in self.blocks.iter().zip(blocks) {
                recorder.register_gauge(key, &METADATA).set(blocks as f64);
            }
            for (key, count) in self.counters.iter().zip(counters) {
                recorder.register_counter(key, &METADATA).absolute(count);
            }
        });
    }
}
