//! From the pool's events to those of routers.

use std::collections::HashMap;

use block_pool::{BlockPool, GroupBlock, KvEvent, SaltFrom};

use crate::described::{Content, Describes};
use crate::name::name;
use crate::wire::{Event, Medium};

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
    describes: Describes,
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
        Self { medium: Medium::Gpu, describes: Describes::of(pool), names: HashMap::new() }
    }

    /// Sets the medium, which is [`Medium::Gpu`] by default.
    #[must_use]
    pub fn medium(self, medium: Medium) -> Self {
        Self { medium, ..self }
    }

    /// Translates consecutive events. Blocks that follow each other are one event.
    pub fn translate(&mut self, events: impl IntoIterator<Item = KvEvent>) -> Vec<Event> {
        joined(events.into_iter().filter_map(|event| self.translate_one(event)))
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
                let block_size = self.describes.block_size;
                let first = tokens.len().saturating_sub(block_size);
                for tokens in tokens[..first].chunks(block_size) {
                    let end = start + tokens.len();
                    before = Some(name(before, tokens, &key, SaltFrom::at(&salts, start..end)));
                    start = end;
                }
                let (tokens, end) = (&tokens[first..], start + block_size);
                let salts = SaltFrom::at(&salts, start..end);
                let name = name(before, tokens, &key, salts);
                self.names.insert(GroupBlock { group, block }, Named { name, end });
                Some(self.describes.stored(self.medium, group, Content { name, before, tokens, key: &key, salts }))
            }
            KvEvent::BlockRemoved { group, block } => {
                let name = self.names.remove(&GroupBlock { group, block })?.name;
                Some(self.describes.removed(self.medium, group, name))
            }
            KvEvent::AllBlocksCleared => {
                self.names.clear();
                Some(Event::AllBlocksCleared {})
            }
            _ => None,
        }
    }
}

/// Consecutive events, of which those that continue each other are one.
pub(crate) fn joined(events: impl IntoIterator<Item = Event>) -> Vec<Event> {
    let mut joined: Vec<Event> = Vec::new();
    for event in events {
        let rest = match joined.last_mut() {
            Some(last) => appended(last, event),
            None => Some(event),
        };
        joined.extend(rest);
    }
    joined
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
                medium,
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
                medium: of,
                ..
            },
        ) if (*group_idx, *medium) == (group, of)
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
            Event::BlockRemoved { block_hashes, group_idx, medium },
            Event::BlockRemoved { block_hashes: names, group_idx: group, medium: of },
        ) if (*group_idx, *medium) == (group, of) => {
            block_hashes.extend(names);
            None
        }
        (_, event) => Some(event),
    }
}
