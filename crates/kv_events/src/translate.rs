//! From the pool's events to those of routers.

use std::collections::HashMap;
use std::ops::Range;

use block_pool::{BlockPool, GroupBlock, KvEvent, PoolGroup, PrefixKey, Salt, SaltFrom};

use crate::name::name;
use crate::wire::{Event, ExtraKeys, Medium, SpecKind};

/// Turns the events of one pool into those of routers.
///
/// Blocks get names of 64 bits: a hash (SHA-256) of the tokens, salts and window from the start of the sequence on. So
/// the same prefix has the same name in all engines and at all times. Dynamo's router needs that: it keeps one index by
/// the names of all engines. With a key of each process in the names it would follow one of them only. In the pool
/// names decide nothing: it compares tokens. The names of what is cached are kept, some 50 bytes for each block.
///
/// All events of a subscription have to pass, in order. A stream that begins again
/// ([`BlockPool::subscribe_within`]) begins with an event that clears all, so routers begin again, too.
#[derive(Debug)]
pub struct Translator {
    medium: Medium,
    block_size: usize,
    groups: Vec<PoolGroup>,
    names: HashMap<GroupBlock, Named>,
}

/// A block that is cached.
#[derive(Debug)]
struct Named {
    name: u64,
    /// The position after its last token.
    end: usize,
}

impl Translator {
    /// For the events of this pool, from the first one of a [subscription](BlockPool::subscribe) on.
    pub fn of(pool: &BlockPool) -> Self {
        let (block_size, groups) = (pool.block_size(), pool.groups().to_vec());
        Self { medium: Medium::Gpu, block_size, groups, names: HashMap::new() }
    }

    /// Sets the medium, which is [`Medium::Gpu`] by default.
    #[must_use]
    pub fn medium(self, medium: Medium) -> Self {
        Self { medium, ..self }
    }

    /// Translates consecutive events. Blocks that follow each other are one event.
    pub fn translate(&mut self, events: impl IntoIterator<Item = KvEvent>) -> Vec<Event> {
        let mut translated: Vec<Event> = Vec::new();
        for event in events {
            let Some(event) = self.translate_one(event) else { continue };
            if let Some(event) = match translated.last_mut() {
                Some(last) => appended(last, event),
                None => Some(event),
            } {
                translated.push(event);
            }
        }
        translated
    }

    fn translate_one(&mut self, event: KvEvent) -> Option<Event> {
        match event {
            KvEvent::BlockStored { group, block, parent, tokens, key, salts } => {
                let (mut before, mut start) = match parent {
                    Some(parent) => self.names.get(&parent).map(|parent| (Some(parent.name), parent.end))?,
                    None => (None, 0),
                };
                // The block's own tokens are the last; those before them are of blocks that were removed. These get the
                // names that they had, and will have when they are cached again.
                let first = tokens.len().saturating_sub(self.block_size);
                for tokens in tokens[..first].chunks(self.block_size) {
                    let end = start + tokens.len();
                    before = Some(name(before, tokens, &key, salts_at(&salts, start..end)));
                    start = end;
                }
                let (tokens, end) = (&tokens[first..], start + self.block_size);
                let salts = salts_at(&salts, start..end);
                let name = name(before, tokens, &key, salts);
                self.names.insert(GroupBlock { group, block }, Named { name, end });
                let extra_keys = extra_keys(before.is_none(), &key, salts);
                let (kind, window) = self.spec(group, &key);
                Some(Event::BlockStored {
                    block_hashes: vec![name],
                    parent_block_hash: before,
                    token_ids: tokens.to_vec(),
                    block_size: self.block_size,
                    lora_id: None,
                    medium: self.medium,
                    lora_name: None,
                    extra_keys: extra_keys.map(|keys| vec![Some(keys)]),
                    group_idx: self.group_idx(group),
                    kv_cache_spec_kind: kind,
                    kv_cache_spec_sliding_window: window,
                })
            }
            KvEvent::BlockRemoved { group, block } => {
                let name = self.names.remove(&GroupBlock { group, block })?.name;
                let group_idx = self.group_idx(group);
                Some(Event::BlockRemoved { block_hashes: vec![name], medium: self.medium, group_idx })
            }
            KvEvent::AllBlocksCleared => {
                self.names.clear();
                Some(Event::AllBlocksCleared {})
            }
            _ => None,
        }
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

/// Appends an event to the one before it if it continues it; otherwise returns it.
fn appended(last: &mut Event, event: Event) -> Option<Event> {
    match (last, event) {
        (
            Event::BlockStored {
                block_hashes,
                token_ids,
                group_idx,
                kv_cache_spec_kind,
                kv_cache_spec_sliding_window,
                extra_keys,
                ..
            },
            Event::BlockStored {
                block_hashes: names,
                parent_block_hash,
                token_ids: tokens,
                group_idx: group,
                kv_cache_spec_kind: kind,
                kv_cache_spec_sliding_window: window,
                extra_keys: keys,
                ..
            },
        ) if *group_idx == group
            && (*kv_cache_spec_kind, *kv_cache_spec_sliding_window) == (kind, window)
            && parent_block_hash.is_some()
            && block_hashes.last().copied() == parent_block_hash =>
        {
            if extra_keys.is_some() || keys.is_some() {
                let all = extra_keys.get_or_insert_with(|| vec![None; block_hashes.len()]);
                all.push(keys.and_then(|mut keys| keys.pop().flatten()));
            }
            block_hashes.extend(names);
            token_ids.extend(tokens);
            None
        }
        (
            Event::BlockRemoved { block_hashes, group_idx, .. },
            Event::BlockRemoved { block_hashes: names, group_idx: group, .. },
        ) if *group_idx == group => {
            block_hashes.extend(names);
            None
        }
        (_, event) => Some(event),
    }
}

/// The salts that begin at these positions; `salts` are in the order of their positions.
fn salts_at(salts: &[SaltFrom], positions: Range<usize>) -> &[SaltFrom] {
    let before = |end: usize| salts.partition_point(|salt| salt.position < end);
    &salts[before(positions.start)..before(positions.end)]
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
