//! Tells routers what a tier has.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_pool::{BlockPool, PrefixKey, SaltFrom, StorageError, Tier, TierCursor, TierPlace, TierWatcher};

use crate::described::{Content, Describes};
use crate::name::name;
use crate::translate::joined;
use crate::wire::{Event, Medium};

/// The most events that wait to be published. When there are more, everything is published again.
const MOST_WAITING: usize = 1 << 16;

/// A tier whose blocks routers know: those that are stored or loaded through it, until they leave. Blocks that another
/// process has stored there are published when they are loaded.
///
/// Use it in the place of the tier, for [`offload_to`](BlockPool::offload_to) and for reading, and give it to a
/// publisher, or take its [events](Self::take).
///
/// It keeps the tokens of each block that it knows, some 300 bytes for 16 tokens.
#[derive(Debug)]
pub struct PublishedTier {
    tier: Arc<dyn Tier>,
    known: Arc<Known>,
}

#[derive(Debug)]
struct Known {
    medium: Medium,
    describes: Describes,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    blocks: HashMap<(TierPlace, usize), Block>,
    waiting: Vec<Event>,
    has_lost: bool,
}

/// A block that the tier has.
#[derive(Debug)]
struct Block {
    name: u64,
    stored: Event,
    /// The number of blocks before it in its sequence.
    number: usize,
}

impl PublishedTier {
    /// A tier below this pool, as [`Medium::Storage`] or another medium. `None` if the tier does not say which blocks
    /// leave, or says it to another already.
    pub fn new(tier: Arc<dyn Tier>, pool: &BlockPool, medium: Medium) -> Option<Self> {
        let known = Arc::new(Known { medium, describes: Describes::of(pool), state: Mutex::default() });
        let left = known.clone();
        let watches = tier.watch(Box::new(move |place, group| left.remove(place, group)));
        watches.then_some(Self { tier, known })
    }

    /// The events since the last call. `None` if there were too many of them: then routers need [all](Self::all).
    pub fn take(&self) -> Option<Vec<Event>> {
        let mut state = self.known.state();
        let events = std::mem::take(&mut state.waiting);
        let has_lost = state.has_lost;
        drop(state);
        (!has_lost).then(|| joined(events))
    }

    /// The events for routers that know nothing of the tier. Those that wait are a part of them.
    pub fn all(&self) -> Vec<Event> {
        let mut state = self.known.state();
        (state.waiting, state.has_lost) = (Vec::new(), false);
        let mut all: Vec<(usize, Event)> =
            state.blocks.values().map(|block| (block.number, block.stored.clone())).collect();
        drop(state);
        // Parents before those that follow them.
        all.sort_by_key(|(number, _)| *number);
        joined(all.into_iter().map(|(_, event)| event))
    }
}

impl Known {
    fn add(&self, place: TierPlace, group: usize, number: usize, content: Content<'_>) {
        let mut state = self.state();
        if state.blocks.contains_key(&(place, group)) {
            return;
        }
        let stored = self.describes.stored(self.medium, group, content);
        state.publish(stored.clone());
        state.blocks.insert((place, group), Block { name: content.name, stored, number });
    }

    fn remove(&self, place: &TierPlace, group: usize) {
        let mut state = self.state();
        if let Some(block) = state.blocks.remove(&(*place, group)) {
            state.publish(self.describes.removed(self.medium, group, block.name));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in it panics half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn publish(&mut self, event: Event) {
        if self.waiting.len() < MOST_WAITING {
            self.waiting.push(event);
        } else {
            (self.waiting, self.has_lost) = (Vec::new(), true);
        }
    }
}

impl Tier for PublishedTier {
    fn cursor<'a>(&'a self, key: &PrefixKey) -> Box<dyn TierCursor + 'a> {
        let (cursor, known) = (self.tier.cursor(key), &*self.known);
        Box::new(Cursor {
            cursor,
            known,
            key: key.clone(),
            blocks: 0,
            before: None,
            name: None,
            tokens: vec![],
            salts: vec![],
        })
    }

    fn watch(&self, left: TierWatcher) -> bool {
        drop(left);
        false
    }
}

struct Cursor<'a> {
    cursor: Box<dyn TierCursor + 'a>,
    known: &'a Known,
    key: PrefixKey,
    /// How many blocks it has gone over, with this one.
    blocks: usize,
    before: Option<u64>,
    name: Option<u64>,
    tokens: Vec<u32>,
    salts: Vec<SaltFrom>,
}

impl Cursor<'_> {
    fn publish(&self, group: usize) {
        let (Some(place), Some(name)) = (self.cursor.place(), self.name) else { return };
        let Self { known, key, blocks, before, tokens, salts, .. } = self;
        known.add(place, group, *blocks, Content { name, before: *before, tokens, key, salts });
        // It may have left before it was known.
        if !self.cursor.contains(group) {
            known.remove(&place, group);
        }
    }
}

impl TierCursor for Cursor<'_> {
    fn advance(&mut self, tokens: &[u32], salts: &[SaltFrom]) {
        self.cursor.advance(tokens, salts);
        self.blocks += 1;
        (self.tokens, self.salts) = (tokens.to_vec(), salts.to_vec());
        self.before = self.name;
        self.name = Some(name(self.before, tokens, &self.key, salts));
    }

    fn place(&self) -> Option<TierPlace> {
        self.cursor.place()
    }

    fn contains(&self, group: usize) -> bool {
        self.cursor.contains(group)
    }

    fn load(&mut self, group: usize) -> Option<&[u8]> {
        // Twice, because what is loaded borrows the cursor.
        if self.cursor.contains(group) {
            self.publish(group);
        }
        self.cursor.load(group)
    }

    fn store(&mut self, group: usize, bytes: &[u8]) -> Result<bool, StorageError> {
        let is_new = self.cursor.store(group, bytes)?;
        self.publish(group);
        Ok(is_new)
    }
}
