//! The guarantees of blocks and tables, checked over random histories against a naive model.
//!
//! 1. A written token stays readable at its position until it is truncated, its window has passed it or its table is
//!    dropped, whatever forks, failures, evictions and other sequences do: two writers never share a slot, and freed
//!    blocks are overwritten at once.
//! 2. A failed request changes nothing: the table, the ref_count of every block and the number of available blocks are
//!    as before.
//! 3. A table has exactly as many blocks as its tokens need, plus the reserved ones, minus those that its window has
//!    passed or that were freed.
//! 4. Every block is free, or evictable, or in use with a ref_count equal to the number of tables that use it.
//! 5. A match has the content that a sequence with these tokens, the same salt and the same window has computed: never
//!    that of another, never what was not committed, never what was computed before a reset. The last of the given
//!    tokens is never matched.
//! 6. Nothing is evicted while there are free blocks: a prefix whose blocks are all cached is matched in full.
//! 7. The stream of events tells what can be matched. Applied in order, the parent of each stored block is stored; no
//!    block is removed before its children unless a sequence has freed it before them; and at the end the same blocks
//!    are stored as in the pool. A stream that begins late leads to the same.
//! 8. A sequence that was swapped out comes back byte for byte.
//! 9. After all tables are dropped, all blocks are available. As many blocks can be allocated as are available.
//! 10. A match is as long as possible: in whole blocks it is never shorter than the stored blocks allow, according to
//!     the events, and it is never longer.
//! 11. A look-up uses nothing, and gives exactly what a match and a reservation right after it get and use.
//! 12. Slots that were made writable are in blocks that no other table uses and that are not cached. A table whose
//!     committed tokens may have been overwritten is private from then on: it matches nothing, and no more of its
//!     blocks are cached than before.
//!
//! `PROPTEST_CASES` sets the number of histories.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use block_table::{
    BlockId, BlockPool, BlockState, BlockTable, KvEvent, KvEvents, PrefixKey, ReserveError, Salt, SwappedTable,
    TableOptions, Window,
};
use common::{Slots, content};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Action {
    /// A new sequence with a prompt of this length, whose last few tokens depend on the branch.
    Create {
        kind: usize,
        prompt: usize,
        branch: u32,
    },
    /// Look up what a new sequence with such a prompt would take, then match and reserve it.
    LookUp {
        kind: usize,
        prompt: usize,
        branch: u32,
    },
    /// Continue a sequence with the cached blocks of its next tokens.
    MatchPrefix {
        table: usize,
    },
    /// Reserve some tokens, write them, commit some of them, and roll the rest back or leave it reserved.
    Step {
        table: usize,
        reserve: usize,
        commit: usize,
        known: bool,
        roll_back: bool,
    },
    Reserve {
        table: usize,
        tokens: usize,
    },
    Truncate {
        table: usize,
        len: usize,
    },
    /// Write some positions again, as layers do that do not process their tokens together.
    MakeWritable {
        table: usize,
        start: usize,
        tokens: usize,
    },
    ShrinkTo {
        table: usize,
        end: usize,
    },
    FreeBefore {
        table: usize,
        position: usize,
    },
    Fork {
        table: usize,
        len: usize,
    },
    Drop {
        table: usize,
    },
    SwapOut {
        table: usize,
    },
    SwapIn {
        swapped: usize,
    },
    Reset,
    /// Allocate every available block, so that the next reservations fail. [`Relax`](Self::Relax) frees them.
    Exhaust,
    Relax,
    Fail(bool),
}

fn action() -> impl Strategy<Value = Action> {
    let table = 0..8usize;
    let flag = prop::bool::weighted(0.8);
    prop_oneof![
        4 => (0..6usize, 0..40usize, 0..3u32)
            .prop_map(|(kind, prompt, branch)| Action::Create { kind, prompt, branch }),
        3 => (0..6usize, 0..60usize, 0..3u32).prop_map(|(kind, prompt, branch)| Action::LookUp { kind, prompt, branch }),
        2 => table.clone().prop_map(|table| Action::MatchPrefix { table }),
        8 => (table.clone(), 0..30usize, 0..30usize, flag, flag)
            .prop_map(|(table, reserve, commit, known, roll_back)| {
                Action::Step { table, reserve, commit, known, roll_back }
            }),
        1 => (table.clone(), 0..30usize).prop_map(|(table, tokens)| Action::Reserve { table, tokens }),
        3 => (table.clone(), 0..60usize).prop_map(|(table, len)| Action::Truncate { table, len }),
        1 => (table.clone(), 0..60usize, 0..20usize)
            .prop_map(|(table, start, tokens)| Action::MakeWritable { table, start, tokens }),
        1 => (table.clone(), 0..90usize).prop_map(|(table, end)| Action::ShrinkTo { table, end }),
        1 => (table.clone(), 0..60usize).prop_map(|(table, position)| Action::FreeBefore { table, position }),
        3 => (table.clone(), 0..60usize).prop_map(|(table, len)| Action::Fork { table, len }),
        3 => table.clone().prop_map(|table| Action::Drop { table }),
        1 => table.clone().prop_map(|table| Action::SwapOut { table }),
        2 => table.prop_map(|swapped| Action::SwapIn { swapped }),
        1 => prop::bool::weighted(0.3).prop_map(|reset| if reset { Action::Reset } else { Action::Relax }),
        1 => Just(Action::Exhaust),
        2 => Just(Action::Relax),
        1 => any::<bool>().prop_map(Action::Fail),
    ]
}

/// What the model knows of a sequence: the content of each position, and what it depends on.
#[derive(Clone)]
struct Model {
    /// All tokens of the sequence, computed or not.
    stream: Vec<u32>,
    /// The content of each computed position.
    written: Vec<u64>,
    /// Its salt and window, and the number of resets before it was computed: what its content depends on in addition to
    /// the tokens.
    kind: usize,
    era: u64,
    /// How many of its first tokens were freed by `free_before`.
    freed: usize,
    /// If it has become private: those of its blocks that were cached at that moment and still are.
    private: Option<HashSet<BlockId>>,
}

impl Model {
    fn truncate(&mut self, len: usize) {
        self.stream.truncate(len);
        self.written.truncate(len);
        if len == 0 {
            self.freed = 0;
        }
    }
}

struct World {
    pool: BlockPool,
    slots: Slots,
    tables: Vec<(BlockTable, Model)>,
    /// Swapped out tables, and how many of their first blocks were cached.
    swapped: Vec<(SwappedTable, Model, usize)>,
    hoard: Vec<BlockTable>,
    events: KvEvents,
    /// What a router knows: the key and the prefix of each stored block.
    router: HashMap<BlockId, (PrefixKey, Vec<u32>)>,
    era: u64,
    serial: u32,
    /// Whether a table without a window has freed blocks and kept later ones, which may then stay cached longer.
    orphans: bool,
}

/// Three salts, with and without a window.
fn options(kind: usize) -> TableOptions {
    let salt = [Salt::none(), Salt::new(b""), Salt::new(b"b")][kind % 3].clone();
    let options = TableOptions::default().salt(salt);
    if kind < 3 { options } else { options.window(Window::new(kind * 3 - 5).with_sink_tokens(kind % 3)) }
}

/// What a model writes for the last of these tokens in a sequence of this kind.
fn written(kind: usize, era: u64, tokens: &[u32]) -> u64 {
    content(tokens) ^ (kind as u64) << 50 ^ era << 40
}

/// A prompt whose last few tokens depend on the branch.
fn stream(prompt: usize, branch: u32) -> Vec<u32> {
    (0..prompt as u32).map(|at| if at + 7 < prompt as u32 { at } else { at * 4 + branch }).collect()
}

/// What a router does with an event.
fn route(router: &mut HashMap<BlockId, (PrefixKey, Vec<u32>)>, event: KvEvent, orphans: bool) -> Check {
    match event {
        KvEvent::BlockStored { block, parent, tokens, key, .. } => {
            let before = match parent {
                Some(parent) => {
                    let (of_parent, before) = router.get(&parent.block).ok_or(TestCaseError::fail("no parent"))?;
                    prop_assert_eq!(of_parent, &key);
                    before.clone()
                }
                None => vec![],
            };
            prop_assert_eq!(router.insert(block, (key, [before, tokens].concat())), None, "stored twice");
        }
        KvEvent::BlockRemoved { block, .. } => {
            let Some((key, prefix)) = router.remove(&block) else {
                return Err(TestCaseError::fail("removed, but not stored"));
            };
            let orphan = |(other, longer): &(PrefixKey, Vec<u32>)| *other == key && longer.starts_with(&prefix);
            prop_assert!(
                key.window.is_some() || orphans || !router.values().any(orphan),
                "a parent was removed before its child"
            );
        }
        KvEvent::AllBlocksCleared => router.clear(),
        other => return Err(TestCaseError::fail(format!("{other:?}"))),
    }
    Ok(())
}

type Check = Result<(), TestCaseError>;

impl World {
    fn new(blocks: usize, block_size: usize) -> Self {
        let (pool, slots) = Slots::pool(blocks, block_size);
        let events = pool.subscribe();
        Self {
            pool,
            slots,
            tables: vec![],
            swapped: vec![],
            hoard: vec![],
            events,
            router: HashMap::new(),
            era: 0,
            serial: 1000,
            orphans: false,
        }
    }

    fn pick(n: usize, len: usize) -> Option<usize> {
        n.checked_rem(len)
    }

    /// The ref_count of each block, and the number of available blocks.
    fn ref_counts(&self) -> (Vec<u32>, usize) {
        let ref_count = |state: BlockState| if let BlockState::InUse(n) = state { n } else { 0 };
        (self.pool.snapshot().blocks.into_iter().map(ref_count).collect(), self.pool.available())
    }

    fn check_refusal(&self, error: &ReserveError, before: &(Vec<u32>, usize)) -> Check {
        match error {
            ReserveError::OutOfBlocks(error) => {
                prop_assert!(error.requested > error.available);
                prop_assert_eq!(error.available, before.1);
            }
            ReserveError::Storage(_) => prop_assert!(self.slots.fails()),
        }
        prop_assert_eq!(before, &self.ref_counts());
        Ok(())
    }

    /// Reserves, and returns whether that worked.
    fn reserve(&mut self, t: usize, n: usize) -> Result<bool, TestCaseError> {
        let before = self.ref_counts();
        let table = &mut self.tables[t].0;
        let blocks = table.blocks().to_vec();
        match table.reserve(n) {
            Ok(()) => prop_assert!(table.capacity() >= table.len() + n),
            Err(error) => {
                prop_assert_eq!(blocks, table.blocks());
                self.check_refusal(&error, &before)?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Continues a sequence with cached blocks, and checks that they have what the sequence would have computed.
    fn match_prefix(&mut self, t: usize) -> Check {
        let era = self.era;
        let (table, model) = &mut self.tables[t];
        let had = table.len();
        prop_assert_eq!(had, model.written.len());
        let expected = table.lookup_prefix(&model.stream);
        let matched = table.match_prefix(&model.stream);
        prop_assert!(matched == 0 || model.private.is_none(), "a table that was overwritten is not continued");
        prop_assert_eq!(table.len(), had + matched);
        prop_assert_eq!(expected.tokens, matched);
        prop_assert!(matched == 0 || table.len() < model.stream.len(), "the last token is not matched");
        if matched > 0 {
            prop_assert!(had == 0 || model.era == era, "what was computed before a reset is not continued");
            model.era = era;
        }
        for position in had..table.len() {
            model.written.push(written(model.kind, era, &model.stream[..=position]));
        }
        Ok(())
    }

    /// Makes positions writable, and writes all of them that have a slot.
    fn make_writable(&mut self, t: usize, positions: Range<usize>) -> Check {
        let table = &mut self.tables[t].0;
        let slots = |table: &BlockTable| -> Vec<_> { (0..table.capacity()).map(|at| table.slot(at)).collect() };
        let (len, capacity, before) = (table.len(), table.capacity(), slots(table));
        let done = table.make_writable(positions.clone());
        prop_assert_eq!((table.len(), table.capacity()), (len, capacity));
        match done {
            // Some blocks may have been replaced by copies. `check` compares their content like any other.
            Err(ReserveError::OutOfBlocks(error)) => {
                prop_assert!(error.requested > error.available);
                prop_assert_eq!(error.available, self.pool.available());
                return Ok(());
            }
            Err(ReserveError::Storage(_)) => {
                prop_assert!(self.slots.fails());
                return Ok(());
            }
            Ok(()) => {}
        }
        self.follow_events()?;
        let states = self.pool.snapshot().blocks;
        let (table, model) = &mut self.tables[t];
        let block_size = self.pool.block_size();
        for (at, before) in before.into_iter().enumerate() {
            let slot = table.slot(at);
            prop_assert_eq!(slot.is_some(), before.is_some());
            let Some(slot) = slot.filter(|_| positions.contains(&at)) else { continue };
            prop_assert_eq!(
                states[slot / block_size],
                BlockState::InUse(1),
                "another table uses the block of position {}",
                at
            );
            let stored = self.router.keys().any(|id| id.index() == slot / block_size);
            prop_assert!(!stored, "the block of position {} is cached", at);
            self.serial += 1;
            let what = u64::from(self.serial) << 32;
            self.slots.write(slot, what);
            if at < len {
                model.written[at] = what;
            }
        }
        if !positions.is_empty() && positions.start < len && model.private.is_none() {
            model.private = Some(table.blocks().iter().filter(|id| self.router.contains_key(id)).copied().collect());
        }
        Ok(())
    }

    fn apply(&mut self, action: &Action) -> Check {
        match *action {
            Action::Create { kind, prompt, branch } => {
                let kind = kind % 6;
                let table = BlockTable::with_options(&self.pool, &options(kind));
                let (stream, era) = (stream(prompt, branch), self.era);
                let model = Model { stream, written: vec![], kind, era, freed: 0, private: None };
                self.tables.push((table, model));
                self.match_prefix(self.tables.len() - 1)?;
            }
            Action::LookUp { kind, prompt, branch } => {
                let mut table = BlockTable::with_options(&self.pool, &options(kind));
                let stream = stream(prompt, branch);
                let before = self.ref_counts();
                let expected = table.lookup_prefix(&stream);
                prop_assert_eq!(&before, &self.ref_counts());
                let (least, most) = self.matchable(kind, &stream);
                prop_assert!((least..=most).contains(&expected.tokens), "{} of {}..={}", expected.tokens, least, most);
                let matched = table.match_prefix(&stream);
                prop_assert_eq!(
                    (expected.tokens, expected.in_use + expected.evictable),
                    (matched, table.blocks().len())
                );
                match table.reserve(stream.len() - matched) {
                    Ok(()) => prop_assert_eq!(before.1.checked_sub(expected.blocks), Some(self.pool.available())),
                    Err(ReserveError::OutOfBlocks(_)) => prop_assert!(expected.blocks > before.1),
                    Err(ReserveError::Storage(_)) => prop_assert!(self.slots.fails()),
                }
            }
            Action::MatchPrefix { table } => {
                let Some(t) = Self::pick(table, self.tables.len()) else { return Ok(()) };
                self.match_prefix(t)?;
            }
            Action::Step { table, reserve, commit, known, roll_back } => {
                let Some(t) = Self::pick(table, self.tables.len()) else { return Ok(()) };
                if !self.reserve(t, reserve)? {
                    return Ok(());
                }
                let (table, model) = &mut self.tables[t];
                let computed = table.len();
                if computed == 0 {
                    model.era = self.era;
                }
                while model.stream.len() < computed + reserve {
                    self.serial += 1;
                    model.stream.push(self.serial % 3);
                }
                for position in computed..computed + reserve {
                    let what = written(model.kind, model.era, &model.stream[..=position]);
                    self.slots.write(table.slot(position).unwrap(), what);
                    if position < computed + commit {
                        model.written.push(what);
                    }
                }
                let committed = commit.min(reserve);
                let tokens = model.stream[computed..computed + committed].to_vec();
                // Tokens that were not committed are not part of the stream.
                model.stream.truncate(model.stream.len().max(computed + committed));
                if known {
                    table.commit_tokens(&tokens).unwrap()
                } else {
                    table.commit(committed).unwrap()
                }
                let reserved = table.capacity() - table.len();
                prop_assert!(table.commit(reserved + 1).is_err());
                prop_assert!(table.commit_tokens(&vec![0; reserved + 1]).is_err());
                if roll_back {
                    table.roll_back();
                }
            }
            Action::Reserve { table, tokens } => {
                let Some(t) = Self::pick(table, self.tables.len()) else { return Ok(()) };
                self.reserve(t, tokens)?;
            }
            Action::Truncate { table, len } => {
                let Some(t) = Self::pick(table, self.tables.len()) else { return Ok(()) };
                let (table, model) = &mut self.tables[t];
                let before = (table.len(), table.blocks().to_vec());
                match table.truncate(len) {
                    Ok(()) => {
                        if len < before.0 {
                            // The next tokens are new, so that the streams differ.
                            model.truncate(len);
                        }
                        prop_assert!(len == 0 || len >= model.freed);
                    }
                    Err(error) => {
                        prop_assert!(table.window().is_some() || (1..model.freed).contains(&len));
                        prop_assert!(error.needed < error.kept);
                        prop_assert_eq!(before, (table.len(), table.blocks().to_vec()));
                    }
                }
            }
            Action::Fork { table, len } => {
                let Some(t) = Self::pick(table, self.tables.len()) else { return Ok(()) };
                let available = self.pool.available();
                let (table, model) = &self.tables[t];
                if let Ok(fork) = table.fork_at(len) {
                    prop_assert_eq!(self.pool.available(), available);
                    let mut model = model.clone();
                    model.truncate(len);
                    self.tables.push((fork, model));
                }
            }
            Action::MakeWritable { table, start, tokens } => {
                let Some(t) = Self::pick(table, self.tables.len()) else { return Ok(()) };
                let table = &self.tables[t].0;
                self.orphans |= start / self.pool.block_size() + 1 < table.capacity() / self.pool.block_size();
                self.make_writable(t, start..start + tokens)?;
            }
            Action::ShrinkTo { table, end } => {
                let Some(t) = Self::pick(table, self.tables.len()) else { return Ok(()) };
                let table = &mut self.tables[t].0;
                let before = (table.len(), table.capacity(), self.pool.available());
                table.shrink_to(end);
                let capacity = end.max(before.0).next_multiple_of(self.pool.block_size());
                prop_assert_eq!((table.len(), table.capacity()), (before.0, capacity.min(before.1)));
                prop_assert!(self.pool.available() >= before.2);
            }
            Action::FreeBefore { table, position } => {
                let Some(t) = Self::pick(table, self.tables.len()) else { return Ok(()) };
                let (table, model) = &mut self.tables[t];
                let (len, blocks, block_size) = (table.len(), table.blocks().to_vec(), self.pool.block_size());
                table.free_before(position);
                if table.window().is_none() {
                    let freed = position.min(len) / block_size * block_size;
                    let more = freed.saturating_sub(model.freed) / block_size;
                    prop_assert_eq!(table.blocks(), &blocks[more..]);
                    self.orphans |= more > 0;
                    model.freed = model.freed.max(freed);
                } else {
                    prop_assert_eq!(table.blocks(), blocks);
                }
                prop_assert_eq!(table.len(), len);
            }
            Action::Drop { table } => {
                let Some(t) = Self::pick(table, self.tables.len()) else { return Ok(()) };
                drop(self.tables.swap_remove(t));
            }
            Action::SwapOut { table } => {
                let Some(t) = Self::pick(table, self.tables.len()) else { return Ok(()) };
                let table = &mut self.tables[t].0;
                table.roll_back();
                let before = (table.len(), table.blocks().to_vec());
                let cached = before.1.iter().take_while(|id| self.router.contains_key(id)).count();
                match table.swap_out() {
                    Ok(swapped) => {
                        prop_assert_eq!((table.len(), table.blocks().len()), (0, 0));
                        prop_assert_eq!((swapped.len(), swapped.blocks()), (before.0, before.1.len()));
                        let (_, model) = self.tables.swap_remove(t);
                        self.swapped.push((swapped, model, cached));
                    }
                    Err(_) => {
                        prop_assert!(self.slots.fails());
                        prop_assert_eq!(before, (table.len(), table.blocks().to_vec()));
                    }
                }
            }
            Action::SwapIn { swapped } => {
                let Some(s) = Self::pick(swapped, self.swapped.len()) else { return Ok(()) };
                let before = self.ref_counts();
                match self.swapped[s].0.swap_in() {
                    Ok(table) => {
                        let (_, mut model, cached) = self.swapped.swap_remove(s);
                        // Its first blocks that were cached are cached again.
                        if model.private.is_some() {
                            model.private = Some(table.blocks()[..cached].iter().copied().collect());
                        }
                        self.tables.push((table, model));
                    }
                    Err(error) => self.check_refusal(&error, &before)?,
                }
            }
            Action::Reset => {
                self.pool.reset_prefix_cache();
                prop_assert_eq!(self.pool.evictable(), 0);
                self.era += 1;
            }
            Action::Exhaust => {
                let mut table = BlockTable::new(&self.pool);
                table.append(self.pool.available() * self.pool.block_size()).unwrap();
                prop_assert_eq!(self.pool.available(), 0);
                self.hoard.push(table);
            }
            Action::Relax => self.hoard.clear(),
            Action::Fail(fails) => self.slots.fail(fails),
        }
        Ok(())
    }

    /// How much of a stream can be matched according to the events: in whole blocks, and with a part of the last block.
    fn matchable(&self, kind: usize, stream: &[u32]) -> (usize, usize) {
        let block_size = self.pool.block_size();
        let (window, mut key) = (options(kind).window, PrefixKey::new().salt(options(kind).salt));
        key.window = window;
        let stored = |whole: usize, n: usize| {
            let mut blocks =
                self.router.values().filter(|(other, prefix)| *other == key && prefix.len() == whole * block_size);
            blocks.any(|(_, prefix)| prefix.starts_with(&stream[..n]))
        };
        let can_end = |n: usize| {
            let seen = |block: usize| {
                let window = window.unwrap_or(Window::new(usize::MAX));
                let (sinks, start) = (window.sink_tokens(), window.start(n));
                block * block_size < sinks || (block + 1) * block_size > start
            };
            let blocks = n.div_ceil(block_size);
            (0..blocks).filter(|&block| seen(block)).all(|block| stored(block + 1, n.min((block + 1) * block_size)))
        };
        let known = stream.len().saturating_sub(1);
        // The path through blocks that the window has passed must be in the tree, too.
        let leads = |n: usize| (n.div_ceil(block_size)..=stream.len() / block_size + 1).any(|block| stored(block, n));
        let ends = |n: &usize| can_end(*n) && (*n == 0 || leads(*n));
        let most = (0..=known).rev().find(ends).unwrap_or(0);
        let least = (0..=known / block_size).rev().map(|block| block * block_size).find(ends).unwrap_or(0);
        (least, most)
    }

    /// Applies the events since the last call, as a router does.
    fn follow_events(&mut self) -> Check {
        for event in self.events.try_iter() {
            if let KvEvent::BlockStored { tokens, .. } = &event {
                prop_assert_eq!(tokens.len(), self.pool.block_size());
            }
            route(&mut self.router, event, self.orphans)?;
        }
        let mut late = HashMap::new();
        for event in self.pool.subscribe().try_iter() {
            route(&mut late, event, self.orphans)?;
        }
        prop_assert_eq!(&late, &self.router);
        Ok(())
    }

    fn check(&mut self) -> Check {
        let tables = || self.tables.iter().map(|(table, _)| table).chain(&self.hoard);
        prop_assert_eq!(self.pool.check_ref_counts(tables().map(BlockTable::blocks)), Ok(()));
        let in_use: HashSet<BlockId> = tables().flat_map(BlockTable::blocks).copied().collect();
        prop_assert_eq!(self.pool.in_use(), in_use.len());

        for (table, model) in &self.tables {
            prop_assert_eq!(table.len(), model.written.len());
            let first_visible = table.window().map_or(model.freed, |window| window.start(table.len()));
            let sinks = table.window().map_or(0, |window| window.sink_tokens());
            for (position, &what) in model.written.iter().enumerate() {
                match table.slot(position) {
                    Some(slot) => prop_assert_eq!(self.slots.get(slot), what, "position {}", position),
                    None => {
                        prop_assert!(position >= sinks && position < first_visible, "{} is still visible", position)
                    }
                }
            }
            prop_assert_eq!(table.slot(table.capacity()), None);
            // As many blocks as the tokens need, minus those that the window has passed.
            let block_size = self.pool.block_size();
            let whole = self.pool.blocks_for(table.len());
            let passed = (first_visible / block_size).saturating_sub(self.pool.blocks_for(sinks));
            let reserved = table.capacity() / block_size - whole;
            prop_assert_eq!(table.blocks().len(), whole - passed + reserved);
        }

        self.follow_events()?;
        for (table, model) in &mut self.tables {
            if let Some(stored) = &mut model.private {
                let now = table.blocks().iter().filter(|id| self.router.contains_key(id)).copied().collect();
                prop_assert!(stored.is_superset(&now), "a block of a private table was cached");
                *stored = now;
            }
        }
        let states = self.pool.snapshot().blocks;
        for (index, state) in states.iter().enumerate() {
            if *state == BlockState::Evictable {
                prop_assert!(self.router.keys().any(|id| id.index() == index), "evictable, but no event");
            }
        }
        let stored = self.router.keys().filter(|id| states[id.index()] == BlockState::Free).count();
        prop_assert_eq!(stored, 0, "stored according to the events, but free");
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_keeps_every_guarantee(
        (blocks, block_size) in (1..90usize, 1..9usize),
        actions in prop::collection::vec(action(), 1..60),
    ) {
        let mut world = World::new(blocks, block_size);
        for action in &actions {
            world.apply(action)?;
            world.check()?;
        }
        let World { pool, tables, hoard, .. } = world;
        drop((tables, hoard));
        prop_assert_eq!(pool.available(), blocks);
        drop(pool.allocate(blocks).unwrap());
        prop_assert_eq!(pool.check_ref_counts([]), Ok(()));
    }

    /// In a pool that never becomes full, a match is as long as the longest common prefix with the full blocks of any
    /// earlier stream of the same salt and window. It may end inside a block.
    #[test]
    fn with_room_nothing_is_evicted(
        block_size in 1..9usize,
        streams in prop::collection::vec((prop::collection::vec(0..2u32, 1..30), 0..4usize), 1..20),
    ) {
        // With a window no longer than a block, the block before is freed too early: no cached block can follow it.
        let options = |kind: usize| {
            let window = Window::new(block_size + 1 + kind).with_sink_tokens(kind % 3);
            if kind < 2 { options(kind) } else { options(kind % 2).window(window) }
        };
        let (pool, slots) = Slots::pool(1000, block_size);
        let mut earlier: Vec<(Vec<u32>, usize)> = vec![];
        for (stream, salt) in streams {
            let mut table = BlockTable::with_options(&pool, &options(salt));
            let matched = table.match_prefix(&stream);
            let full = |other: &[u32]| other.len() / block_size * block_size;
            let common = |other: &[u32]| stream.iter().zip(&other[..full(other)]).take_while(|(a, b)| a == b).count();
            let most = earlier.iter().filter(|(_, s)| *s == salt).map(|(other, _)| common(other)).max().unwrap_or(0);
            prop_assert_eq!(matched, most.min(stream.len() - 1));
            for position in 0..matched {
                if let Some(slot) = table.slot(position) {
                    prop_assert_eq!(slots.get(slot), content(&stream[..=position]) ^ (salt as u64) << 50);
                }
            }
            table.reserve(stream.len() - matched).unwrap();
            for position in matched..stream.len() {
                slots.write(table.slot(position).unwrap(), content(&stream[..=position]) ^ (salt as u64) << 50);
            }
            table.commit_tokens(&stream[matched..]).unwrap();
            earlier.push((stream, salt));
        }
    }
}
