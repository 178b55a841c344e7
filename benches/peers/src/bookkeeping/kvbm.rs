//! NVIDIA's `kvbm-logical`, used in the cheapest way that its interface allows.
//!
//! * It has no frequency tracker, which is optional and would make every match and registration slower.
//! * Blocks are staged with a hash that the caller has computed, and registered as one batch under one lock.
//! * Hashes come from the hashing functions, which copy no tokens; its `TokenBlockSequence` would copy them.
//! * Its log lines have no subscriber, and it has no events.

use anyhow::Result;
use dynamo_tokens::compute_block_hash_for_tokens;
use kvbm_logical::manager::LineageEviction;
use kvbm_logical::{BlockManager, BlockRegistry, ImmutableBlock, MutableBlock, SequenceHash};

use super::BLOCK_SIZE;

/// Its name in the record.
pub(crate) const NAME: &str = "kvbm-logical 1.6.1";

/// The marker type for a storage tier that its manager needs.
#[derive(Debug, Clone)]
pub(crate) struct Tier;

/// How the manager orders registered blocks that are not in use. Its multi-level LRU is left out, because it needs the
/// frequency tracker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    /// Least recently used first, as in our pool.
    Lru,
    /// A hash map, first in first out.
    HashMap,
    /// Leaves of the prefix tree first, oldest first: its default.
    Lineage,
    /// Leaves of the prefix tree first, in a plain queue.
    LineageFifo,
}

impl Backend {
    /// All of them.
    pub(crate) const ALL: [Self; 4] = [Self::Lru, Self::HashMap, Self::Lineage, Self::LineageFifo];

    /// The name in the record of a manager with this backend.
    pub(crate) fn peer(self) -> String {
        let backend = match self {
            Self::Lru => "lru",
            Self::HashMap => "hashmap",
            Self::Lineage => "lineage (its default)",
            Self::LineageFifo => "lineage fifo",
        };
        format!("{NAME}, {backend}")
    }
}

/// A manager, and prompts in it.
pub(crate) struct Kvbm {
    manager: BlockManager<Tier>,
}

impl Kvbm {
    /// A manager of `blocks` blocks.
    ///
    /// # Errors
    ///
    /// If the manager cannot be built.
    pub(crate) fn new(blocks: usize, backend: Backend) -> Result<Self> {
        let builder = BlockManager::builder().block_count(blocks).block_size(BLOCK_SIZE).registry(BlockRegistry::new());
        let builder = match backend {
            Backend::Lru => builder.with_lru_backend(),
            Backend::HashMap => builder.with_hashmap_backend(),
            Backend::Lineage => builder.with_lineage_backend(),
            Backend::LineageFifo => builder.with_lineage_backend_eviction(LineageEviction::Fifo),
        };
        Ok(Self { manager: builder.build()? })
    }

    /// Allocates `n` blocks, which are freed on drop.
    #[inline]
    pub(crate) fn allocate(&self, n: usize) -> Vec<MutableBlock<Tier>> {
        self.manager.allocate_blocks(n).expect("the pool is large enough")
    }

    /// Allocates a block for each of `hashes` and registers it under the hash. After the list is dropped the blocks are
    /// inactive.
    #[inline]
    pub(crate) fn publish(&self, hashes: &[SequenceHash]) -> Vec<ImmutableBlock<Tier>> {
        let blocks = self.allocate(hashes.len()).into_iter().zip(hashes);
        let staged = blocks.map(|(block, &hash)| block.stage(hash, BLOCK_SIZE).expect("the sizes agree"));
        self.manager.register_blocks(staged.collect())
    }

    /// The registered blocks of the longest prefix of `hashes`.
    #[inline]
    pub(crate) fn matching(&self, hashes: &[SequenceHash]) -> Vec<ImmutableBlock<Tier>> {
        self.manager.match_blocks(hashes)
    }

    /// The number of blocks that `hashes` matches.
    pub(crate) fn matches(&self, hashes: &[SequenceHash]) -> usize {
        self.matching(hashes).len()
    }

    /// The number of blocks that are not in use.
    pub(crate) fn available(&self) -> usize {
        self.manager.available_blocks()
    }
}

impl std::fmt::Debug for Kvbm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kvbm").field("available", &self.available()).finish_non_exhaustive()
    }
}

/// The hash of each full block of `tokens`, over the block and all blocks before it.
#[inline]
pub(crate) fn hashes(tokens: &[u32]) -> Vec<SequenceHash> {
    let mut hashes: Vec<SequenceHash> = Vec::with_capacity(tokens.len() / BLOCK_SIZE);
    for block in tokens.chunks_exact(BLOCK_SIZE) {
        let hash = compute_block_hash_for_tokens(block, 0);
        hashes.push(hashes.last().map_or_else(|| SequenceHash::root(hash), |parent| parent.extend(hash)));
    }
    hashes
}

#[cfg(test)]
mod tests {
    use dynamo_tokens::TokenBlockSequence;
    use kvbm_logical::KvbmSequenceHashProvider;

    use super::*;
    use crate::bookkeeping::Prompts;

    #[test]
    fn hashes_equal_those_of_its_own_sequences() {
        let tokens = Prompts::default().next(64 * BLOCK_SIZE + 3);
        let sequence = TokenBlockSequence::from_slice(&tokens, BLOCK_SIZE as u32, None);
        let theirs: Vec<_> = sequence.blocks().iter().map(|block| block.kvbm_sequence_hash()).collect();
        assert_eq!(hashes(&tokens), theirs);
    }
}
