//! What routers are told of a block.

use block_pool::{BlockPool, PoolGroup, PrefixKey, Salt, SaltFrom};

use crate::wire::{Event, ExtraKeys, Medium, SpecKind};

/// Describes the blocks of a pool.
#[derive(Debug, Clone)]
pub(crate) struct Describes {
    pub(crate) block_size: usize,
    groups: Vec<PoolGroup>,
}

/// What a block contains.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Content<'a> {
    pub(crate) name: u64,
    /// The name of the block before it.
    pub(crate) before: Option<u64>,
    pub(crate) tokens: &'a [u32],
    pub(crate) key: &'a PrefixKey,
    /// Those that begin in it.
    pub(crate) salts: &'a [SaltFrom],
}

impl Describes {
    pub(crate) fn of(pool: &BlockPool) -> Self {
        Self { block_size: pool.block_size(), groups: pool.groups().to_vec() }
    }

    pub(crate) fn stored(&self, medium: Medium, group: usize, block: Content<'_>) -> Event {
        let Content { name, before, tokens, key, salts } = block;
        let (kind, window) = self.spec(group, key);
        Event::BlockStored {
            block_hashes: vec![name],
            parent_block_hash: before,
            token_ids: tokens.to_vec(),
            block_size: self.block_size,
            lora_id: None,
            medium,
            lora_name: None,
            extra_keys: extra_keys(before.is_none(), key, salts).map(|keys| vec![Some(keys)]),
            group_idx: self.group_idx(group),
            kv_cache_spec_kind: kind,
            kv_cache_spec_sliding_window: window,
        }
    }

    pub(crate) fn removed(&self, medium: Medium, group: usize, name: u64) -> Event {
        Event::BlockRemoved { block_hashes: vec![name], medium, group_idx: self.group_idx(group) }
    }

    fn group_idx(&self, group: usize) -> Option<usize> {
        (self.groups.len() > 1).then_some(group)
    }

    /// What the layers of a group keep of a sequence with this key, and how many tokens.
    fn spec(&self, group: usize, key: &PrefixKey) -> (Option<SpecKind>, Option<usize>) {
        let span = self.groups.get(group).map(|group| group.span.narrowed_by(key.window)).unwrap_or_default();
        match (span.sliding_window(), span.chunk_tokens()) {
            (Some(window), _) => (Some(SpecKind::SlidingWindow), Some(window.tokens())),
            (None, Some(chunk)) => (Some(SpecKind::ChunkedLocalAttention), Some(chunk)),
            (None, None) => ((self.groups.len() > 1).then_some(SpecKind::FullAttention), None),
        }
    }
}

/// The salts of a block: that of the key in the first block of a sequence, and those that begin in it.
fn extra_keys(is_first: bool, key: &PrefixKey, salts: &[SaltFrom]) -> Option<ExtraKeys> {
    let own = is_first.then_some(&key.salt).into_iter();
    let keys: ExtraKeys = own.chain(salts.iter().map(|from| &from.salt)).filter_map(text).collect();
    Some(keys).filter(|keys| !keys.is_empty())
}

/// A salt as text: as it is if it is UTF-8, otherwise in hexadecimal.
fn text(salt: &Salt) -> Option<String> {
    let bytes = salt.bytes()?;
    let hex = || bytes.iter().fold("0x".to_owned(), |hex, byte| format!("{hex}{byte:02x}"));
    Some(std::str::from_utf8(bytes).map_or_else(|_| hex(), str::to_owned))
}
