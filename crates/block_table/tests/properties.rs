//! What is promised about blocks and tables, checked over random histories against a naive model.
//!
//! - A token that was written is found at its position, until it is truncated or its table is dropped, whatever forks,
//!   failures and other sequences do (no two writers ever share a slot).
//! - A failed reservation changes nothing.
//! - A table holds exactly as many blocks as its tokens need, plus what it has reserved.
//! - Every block is free, or counted exactly as often as tables hold it.
//! - All tables dropped means all blocks available.
//!
//! `PROPTEST_CASES` sets the number of histories.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use block_pool::BlockStorage;
use block_table::{BlockId, BlockPool, BlockTable, ReserveError, StorageError};
use proptest::prelude::*;

/// The bytes behind the pool: what was written to each slot. It can be told to fail.
#[derive(Clone)]
struct Slots(Arc<Mutex<SlotsInner>>);

struct SlotsInner {
    written: Vec<u64>,
    block_size: usize,
    copy_fails: bool,
}

impl BlockStorage for Slots {
    fn copy(&self, from: BlockId, to: BlockId) -> Result<(), StorageError> {
        let mut inner = self.0.lock().unwrap();
        if inner.copy_fails {
            return Err(StorageError::new("told to fail"));
        }
        let size = inner.block_size;
        let start = from.index() * size;
        inner.written.copy_within(start..start + size, to.index() * size);
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Action {
    Create,
    /// Reserve some tokens, write them, commit a part, roll the rest back.
    Step {
        table: usize,
        reserve: usize,
        commit: usize,
    },
    /// Reserve and leave the reservation for later.
    Reserve {
        table: usize,
        tokens: usize,
    },
    RollBack {
        table: usize,
    },
    Truncate {
        table: usize,
        len: usize,
    },
    Fork {
        table: usize,
        len: usize,
    },
    Drop {
        table: usize,
    },
    /// Take every block that is left, so that the next reservations fail, and give them back after some actions.
    Exhaust,
    Relax,
    FailCopies(bool),
}

fn action() -> impl Strategy<Value = Action> {
    let table = 0..8usize;
    prop_oneof![
        2 => Just(Action::Create),
        6 => (table.clone(), 0..30usize, 0..30usize)
            .prop_map(|(table, reserve, commit)| Action::Step { table, reserve, commit }),
        1 => (table.clone(), 0..30usize).prop_map(|(table, tokens)| Action::Reserve { table, tokens }),
        1 => table.clone().prop_map(|table| Action::RollBack { table }),
        2 => (table.clone(), 0..60usize).prop_map(|(table, len)| Action::Truncate { table, len }),
        3 => (table.clone(), 0..60usize).prop_map(|(table, len)| Action::Fork { table, len }),
        2 => table.prop_map(|table| Action::Drop { table }),
        1 => Just(Action::Exhaust),
        2 => Just(Action::Relax),
        1 => any::<bool>().prop_map(Action::FailCopies),
    ]
}

struct World {
    pool: BlockPool,
    slots: Slots,
    tables: Vec<BlockTable>,
    /// The model: what each table's positions hold.
    tokens: Vec<Vec<u64>>,
    hoard: Vec<BlockTable>,
    next_token: u64,
}

impl World {
    fn new(blocks: usize, block_size: usize) -> Self {
        let written = vec![0; blocks * block_size];
        let slots = Slots(Arc::new(Mutex::new(SlotsInner { written, block_size, copy_fails: false })));
        let pool = BlockPool::with_storage(blocks, block_size, slots.clone()).unwrap();
        Self { pool, slots, tables: vec![], tokens: vec![], hoard: vec![], next_token: 1 }
    }

    /// Reserves and says whether that worked; a refusal must be true and must change nothing.
    fn reserve(&mut self, t: usize, n: usize) -> Result<bool, TestCaseError> {
        let before = (self.tables[t].blocks().to_vec(), self.pool.available());
        let table = &mut self.tables[t];
        match table.reserve(n) {
            Ok(()) => {
                prop_assert!(table.capacity() >= table.len() + n);
                return Ok(true);
            }
            Err(ReserveError::OutOfBlocks(error)) => {
                prop_assert!(error.requested > error.available);
                prop_assert_eq!(error.available, before.1);
            }
            Err(ReserveError::Storage(_)) => prop_assert!(self.slots.0.lock().unwrap().copy_fails),
        }
        prop_assert_eq!(before, (table.blocks().to_vec(), self.pool.available()));
        Ok(false)
    }

    fn apply(&mut self, action: &Action) -> Result<(), TestCaseError> {
        let pick = |t: usize, n: usize| (n > 0).then(|| t % n);
        match *action {
            Action::Create => {
                self.tables.push(BlockTable::new(&self.pool));
                self.tokens.push(vec![]);
            }
            Action::Step { table, reserve, commit } => {
                let Some(t) = pick(table, self.tables.len()) else { return Ok(()) };
                if !self.reserve(t, reserve)? {
                    return Ok(());
                }
                let len = self.tables[t].len();
                let new: Vec<u64> = (self.next_token..).take(reserve).collect();
                self.next_token += reserve as u64;
                for (i, &token) in new.iter().enumerate() {
                    let slot = self.tables[t].slot(len + i).unwrap();
                    self.slots.0.lock().unwrap().written[slot] = token;
                }
                let commit = commit.min(reserve);
                self.tables[t].commit(commit).unwrap();
                self.tables[t].roll_back();
                self.tokens[t].extend(&new[..commit]);
            }
            Action::Reserve { table, tokens } => {
                let Some(t) = pick(table, self.tables.len()) else { return Ok(()) };
                self.reserve(t, tokens)?;
                let reserved = self.tables[t].capacity() - self.tables[t].len();
                prop_assert!(self.tables[t].commit(reserved + 1).is_err());
            }
            Action::RollBack { table } => {
                let Some(t) = pick(table, self.tables.len()) else { return Ok(()) };
                self.tables[t].roll_back();
                prop_assert_eq!(self.tables[t].blocks().len(), self.pool.blocks_for(self.tables[t].len()));
            }
            Action::Truncate { table, len } => {
                let Some(t) = pick(table, self.tables.len()) else { return Ok(()) };
                self.tables[t].truncate(len);
                self.tokens[t].truncate(len);
                prop_assert_eq!(self.tables[t].blocks().len(), self.pool.blocks_for(self.tables[t].len()));
            }
            Action::Fork { table, len } => {
                let Some(t) = pick(table, self.tables.len()) else { return Ok(()) };
                let available = self.pool.available();
                let fork = self.tables[t].fork_at(len);
                prop_assert_eq!(self.pool.available(), available);
                self.tables.push(fork);
                let tokens = self.tokens[t].iter().copied().take(len).collect();
                self.tokens.push(tokens);
            }
            Action::Drop { table } => {
                let Some(t) = pick(table, self.tables.len()) else { return Ok(()) };
                drop(self.tables.swap_remove(t));
                self.tokens.swap_remove(t);
            }
            Action::Exhaust => {
                let mut table = BlockTable::new(&self.pool);
                table.append(self.pool.available() * self.pool.block_size()).unwrap();
                prop_assert_eq!(self.pool.available(), 0);
                self.hoard.push(table);
            }
            Action::Relax => self.hoard.clear(),
            Action::FailCopies(fails) => self.slots.0.lock().unwrap().copy_fails = fails,
        }
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let lists = self.tables.iter().chain(&self.hoard).map(BlockTable::blocks);
        prop_assert_eq!(self.pool.check_held(lists), Ok(()));
        let inner = self.slots.0.lock().unwrap();
        for (table, tokens) in self.tables.iter().zip(&self.tokens) {
            prop_assert_eq!(table.len(), tokens.len());
            for (position, token) in tokens.iter().enumerate() {
                prop_assert_eq!(inner.written[table.slot(position).unwrap()], *token, "position {}", position);
            }
            prop_assert_eq!(table.slot(table.capacity()), None);
        }
        // Distinct blocks in the tables, and held blocks in the pool: the same number.
        let mut distinct = HashMap::new();
        for id in self.tables.iter().chain(&self.hoard).flat_map(|t| t.blocks()) {
            *distinct.entry(*id).or_insert(0) += 1;
        }
        prop_assert_eq!(self.pool.held(), distinct.len());
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_keeps_every_promise(
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
        prop_assert_eq!(pool.check_held([]), Ok(()));
    }
}
