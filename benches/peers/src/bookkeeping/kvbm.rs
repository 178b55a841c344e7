//! NVIDIA's `kvbm-logical`, used in the cheapest way that its interface allows.
//!
//! * No frequency tracker: it is optional, and every match and registration would pay for it.
//! * Blocks are staged with a hash that the caller has, and registered as one batch under one lock.
//! * Hashes come from the hashing functions themselves, which copy no tokens; its `TokenBlockSequence` would.
//! * No subscriber for its log lines, and no events.

use anyhow::Result;
use dynamo_tokens::compute_block_hash_for_tokens;
use kvbm_logical::manager::LineageEviction;
use kvbm_logical::{BlockManager, BlockRegistry, ImmutableBlock, MutableBlock, SequenceHash};

use super::BLOCK_SIZE;

/// What the record calls it.
pub(crate) const NAME: &str = "kvbm-logical 1.6.1";

/// Its marker for a tier of storage.
#[derive(Debug, Clone)]
pub(crate) struct Tier;

/// How it keeps the blocks that nobody holds. Its multi-level LRU is left out: that one needs the frequency tracker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    /// Least recently used first, as ours does.
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

    /// What the record calls a manager that has it.
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
    /// If it refuses.
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

    /// `n` blocks, given back when dropped.
    #[inline]
    pub(crate) fn allocate(&self, n: usize) -> Vec<MutableBlock<Tier>> {
        self.manager.allocate_blocks(n).expect("the pool is large enough")
    }

    /// A block for each of `hashes`, registered under it. Dropping the list leaves the blocks inactive.
    #[inline]
    pub(crate) fn publish(&self, hashes: &[SequenceHash]) -> Vec<ImmutableBlock<Tier>> {
        let blocks = self.allocate(hashes.len()).into_iter().zip(hashes);
        let staged = blocks.map(|(block, &hash)| block.stage(hash, BLOCK_SIZE).expect("the sizes agree"));
        self.manager.register_blocks(staged.collect())
    }

    /// The longest run of registered blocks that `hashes` begins with.
    #[inline]
    pub(crate) fn matching(&self, hashes: &[SequenceHash]) -> Vec<ImmutableBlock<Tier>> {
        self.manager.match_blocks(hashes)
    }

    /// How many blocks `hashes` would find.
    pub(crate) fn matches(&self, hashes: &[SequenceHash]) -> usize {
        self.matching(hashes).len()
    }

    /// How many blocks nobody holds.
    pub(crate) fn available(&self) -> usize {
        self.manager.available_blocks()
    }
}

impl std::fmt::Debug for Kvbm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kvbm").field("available", &self.available()).finish_non_exhaustive()
    }
}

/// The hash of each full block of `tokens`, which stands for the block and all before it.
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
    fn hashes_are_those_that_its_own_sequences_have() {
        let tokens = Prompts::default().next(64 * BLOCK_SIZE + 3);
        let sequence = TokenBlockSequence::from_slice(&tokens, BLOCK_SIZE as u32, None);
        let theirs: Vec<_> = sequence.blocks().iter().map(|block| block.kvbm_sequence_hash()).collect();
        assert_eq!(hashes(&tokens), theirs);
    }
}
