//! Blocks that were read from a tier.

use block_pool::{BlockPool, PrefixKey, SaltFrom};

/// Blocks of a prefix that were read from a tier and are not in the pool yet.
#[derive(Clone)]
pub struct FetchedPrefix {
    pub(super) pool: BlockPool,
    /// See [`BlockPool::epoch`].
    pub(super) epoch: u64,
    pub(super) key: PrefixKey,
    pub(super) salts: Vec<SaltFrom>,
    /// The tokens of the sequence up to the end of the last block.
    pub(super) tokens: Vec<u32>,
    /// The number of the first block.
    pub(super) start: usize,
    /// For each block its group, its number, and where it begins in `bytes`.
    pub(super) blocks: Vec<(usize, usize, usize)>,
    pub(super) bytes: Vec<u8>,
    pub(super) has_more: bool,
}

impl FetchedPrefix {
    /// How many tokens the sequence has with these blocks; 0 if there are none.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing was fetched.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Whether the tier seems to have more of the sequence, beyond the most bytes.
    pub fn has_more(&self) -> bool {
        self.has_more
    }

    /// How many bytes of host memory the blocks take.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Keeps the blocks before number `end`.
    pub(super) fn cut(&mut self, end: usize) {
        let kept = self.blocks.partition_point(|&(_, number, _)| number < end);
        self.bytes.truncate(self.blocks.get(kept).map_or(self.bytes.len(), |&(_, _, at)| at));
        self.blocks.truncate(kept);
    }
}

/// Without tokens and bytes, which may be under a salt.
impl std::fmt::Debug for FetchedPrefix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FetchedPrefix").field("len", &self.len()).field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}
