//! The pool's counters for the `metrics` facade.

use metrics::{Key, Label, Level, Metadata};
use smallvec::SmallVec;

use crate::BlockPool;

static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

/// Reports a pool to the recorder that the process has installed for the [`metrics`](https://docs.rs/metrics) facade.
///
/// | name | kind | |
/// |---|---|---|
/// | `kv_cache_blocks` | gauge | labelled `state`: `free`, `in_use` or `evictable`; and `group`, if there are several |
/// | `kv_cache_queried_tokens` | counter | tokens for which a cached prefix was searched |
/// | `kv_cache_hit_tokens` | counter | tokens of these that matched |
/// | `kv_cache_evictions` | counter | cached blocks that were evicted |
/// | `kv_cache_copies` | counter | blocks copied before a write |
///
/// With several groups of layers, the free blocks of one group are those that fit into what all of them have left.
///
/// [`new`](Self::new) builds the metrics' keys once, so that without a recorder a report only reads the pool's
/// counters.
#[derive(Debug)]
pub struct PoolMetrics {
    /// For each group, the keys of its blocks' states.
    blocks: Vec<[Key; 3]>,
    counters: [Key; 4],
}

impl PoolMetrics {
    /// Reports under the label `cache`, because a process may have several caches. If the pool has several `groups`, the
    /// gauges have a label `group`, too.
    pub fn new(cache: &str, groups: usize) -> Self {
        let label = || Label::new("cache", cache.to_owned());
        let key = |group: usize, state| {
            let mut labels = vec![label(), Label::from_static_parts("state", state)];
            labels.extend((groups > 1).then(|| Label::new("group", group.to_string())));
            Key::from_parts("kv_cache_blocks", labels)
        };
        let blocks = (0..groups).map(|group| ["free", "in_use", "evictable"].map(|state| key(group, state))).collect();
        let counters = ["kv_cache_queried_tokens", "kv_cache_hit_tokens", "kv_cache_evictions", "kv_cache_copies"]
            .map(|name| Key::from_parts(name, vec![label()]));
        Self { blocks, counters }
    }

    /// Reports the state of `pool`. A `Step` of `paged_attention` does this when it ends.
    pub fn record(&self, pool: &BlockPool) {
        let (free, usages, stats) = {
            let ledger = pool.ledger();
            let usages: SmallVec<[_; 4]> =
                (0..pool.groups().len()).map(|group| ledger.blocks_of_group(group)).collect();
            (ledger.free_units(), usages, ledger.stats())
        };
        let counters = [stats.queried_tokens, stats.hit_tokens, stats.evictions, stats.copies];
        metrics::with_recorder(|recorder| {
            for ((keys, (in_use, evictable)), group) in self.blocks.iter().zip(usages).zip(pool.groups()) {
                for (key, blocks) in keys.iter().zip([free / group.units, in_use, evictable]) {
                    recorder.register_gauge(key, &METADATA).set(blocks as f64);
                }
            }
            for (key, count) in self.counters.iter().zip(counters) {
                recorder.register_counter(key, &METADATA).absolute(count);
            }
        });
    }
}
