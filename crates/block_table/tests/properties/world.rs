//! A pool, its tables, and the model of both.

use std::collections::HashSet;

use block_table::{
    BlockId, BlockPool, BlockState, BlockTable, GroupBlock, KvEvent, KvEvents, ReserveError, StorageError, SwappedTable,
};
use proptest::prelude::*;

use crate::Check;
use crate::actions::Action;
use crate::common::Slots;
use crate::config::Config;
use crate::model::{Model, in_group};
use crate::router::Router;

pub(crate) struct World {
    pub(crate) config: Config,
    pub(crate) pool: BlockPool,
    /// The slots of each group.
    pub(crate) slots: Vec<Slots>,
    pub(crate) tables: Vec<(BlockTable, Model)>,
    /// Swapped out tables, and how many of their first blocks were cached.
    pub(crate) swapped: Vec<(SwappedTable, Model, usize)>,
    pub(crate) hoard: Vec<BlockTable>,
    pub(crate) events: KvEvents,
    pub(crate) router: Router,
    pub(crate) era: u64,
    pub(crate) serial: u32,
    /// Whether a table without a window has freed blocks and kept later ones, which may then stay cached longer.
    pub(crate) orphans: bool,
}

/// The state of the pool before a request.
#[derive(Debug, PartialEq)]
pub(crate) struct Before {
    states: Vec<Vec<BlockState>>,
    pub(crate) available: usize,
}

impl World {
    pub(crate) fn new(config: Config) -> Self {
        let (pool, slots) = config.pool();
        let events = pool.subscribe();
        Self {
            config,
            pool,
            slots,
            tables: vec![],
            swapped: vec![],
            hoard: vec![],
            events,
            router: Router::default(),
            era: 0,
            serial: 1000,
            orphans: false,
        }
    }

    pub(crate) fn apply(&mut self, action: &Action) -> Check {
        // An action on a table has no effect while there is none.
        let tables = self.tables.len();
        let pick = |n: usize| n.checked_rem(tables);
        match *action {
            Action::Create { kind, prompt, branch, salts } => self.create(kind, prompt, branch, salts),
            Action::LookUp { kind, prompt, branch, salts } => self.look_up(kind, prompt, branch, salts),
            Action::SaltFrom { table, ahead, salt } => pick(table).map_or(Ok(()), |t| self.salt_from(t, ahead, salt)),
            Action::MatchPrefix { table } => pick(table).map_or(Ok(()), |t| self.match_prefix(t)),
            Action::Step { table, reserve, commit, known, roll_back } => {
                pick(table).map_or(Ok(()), |t| self.step(t, reserve, commit, known, roll_back))
            }
            Action::Reserve { table, tokens } => pick(table).map_or(Ok(()), |t| self.reserve(t, tokens).map(|_| ())),
            Action::Truncate { table, len } => pick(table).map_or(Ok(()), |t| self.truncate(t, len)),
            Action::Fork { table, len } => pick(table).map_or(Ok(()), |t| self.fork(t, len)),
            Action::MakeWritable { table, start, tokens } => {
                pick(table).map_or(Ok(()), |t| self.make_writable(t, start..start + tokens))
            }
            Action::ShrinkTo { table, end } => pick(table).map_or(Ok(()), |t| self.shrink_to(t, end)),
            Action::FreeBefore { table, position } => pick(table).map_or(Ok(()), |t| self.free_before(t, position)),
            Action::Drop { table } => {
                pick(table).map(|t| self.tables.swap_remove(t));
                Ok(())
            }
            Action::SwapOut { table } => pick(table).map_or(Ok(()), |t| self.swap_out(t)),
            Action::SwapIn { swapped } => swapped.checked_rem(self.swapped.len()).map_or(Ok(()), |s| self.swap_in(s)),
            Action::Reset => {
                self.pool.reset_prefix_cache();
                prop_assert_eq!(self.pool.evictable(), 0);
                self.era += 1;
                Ok(())
            }
            Action::Exhaust => self.exhaust(),
            Action::Relax => {
                self.hoard.clear();
                Ok(())
            }
            Action::Fail { group, fails } => {
                self.slots[group % self.slots.len()].fail(fails);
                Ok(())
            }
        }
    }

    /// Allocates every available block. Only units that are not enough for a block of every group are left.
    fn exhaust(&mut self) -> Check {
        let mut table = BlockTable::new(&self.pool);
        let (all, each) = (self.pool.available(), self.config.one_of_each());
        let tokens = all / each * self.pool.block_size();
        if self.config.groups.iter().all(|of| of.view.is_all()) {
            table.append(tokens).unwrap();
        } else {
            // Only reserved: a window would free blocks of committed tokens.
            table.reserve(tokens).unwrap();
        }
        prop_assert_eq!(self.pool.available(), all % each);
        self.hoard.push(table);
        Ok(())
    }

    pub(crate) fn groups(&self) -> std::ops::Range<usize> {
        0..self.config.groups.len()
    }

    pub(crate) fn before(&self) -> Before {
        let states = self.pool.snapshot().groups().map(<[_]>::to_vec).collect();
        Before { states, available: self.pool.available() }
    }

    /// A refused request has changed nothing.
    pub(crate) fn check_refusal(&self, error: &ReserveError, before: &Before) -> Check {
        match error {
            ReserveError::OutOfBlocks(error) => {
                prop_assert!(error.requested > error.available);
                prop_assert_eq!(error.available, before.available);
                prop_assert_eq!(before, &self.before());
            }
            ReserveError::Storage(error) => {
                self.check_failure(error)?;
                let after = self.before();
                prop_assert_eq!(before.available, after.available);
                // Blocks may have been evicted before the storage failed.
                prop_assert_eq!(ref_counts(&before.states), ref_counts(&after.states));
            }
        }
        Ok(())
    }

    pub(crate) fn check_failure(&self, _: &StorageError) -> Check {
        prop_assert!(self.slots.iter().any(Slots::fails));
        Ok(())
    }

    /// Applies the events since the last call, as a router does. A router that subscribes now knows the same.
    pub(crate) fn follow_events(&mut self) -> Check {
        let ordered: Vec<bool> = self.config.groups.iter().map(|of| of.view.is_all()).collect();
        for event in self.events.try_iter() {
            if let KvEvent::BlockStored { tokens, .. } = &event {
                prop_assert_eq!(tokens.len(), self.pool.block_size());
            }
            self.router.apply(event, &ordered, self.orphans)?;
        }
        let mut late = Router::default();
        for event in self.pool.subscribe().try_iter() {
            late.apply(event, &ordered, self.orphans)?;
        }
        prop_assert_eq!(&late, &self.router);
        Ok(())
    }

    pub(crate) fn check(&mut self) -> Check {
        self.check_counts()?;
        for (table, model) in &self.tables {
            self.check_table(table, model)?;
        }
        self.follow_events()?;
        for (table, model) in &mut self.tables {
            if let Some(stored) = &mut model.private {
                let now = cached_blocks(table, &self.router);
                prop_assert!(stored.is_superset(&now), "a block of a private table was cached");
                *stored = now;
            }
        }
        let states = self.before().states;
        for (group, states) in states.iter().enumerate() {
            let stored: HashSet<usize> =
                self.router.stored().filter(|id| id.group == group).map(|id| id.block.index()).collect();
            for (index, state) in states.iter().enumerate() {
                match state {
                    BlockState::Evictable => prop_assert!(stored.contains(&index), "evictable, but no event"),
                    BlockState::Free => {
                        prop_assert!(!stored.contains(&index), "stored according to the events, but free")
                    }
                    BlockState::InUse(_) => {}
                }
            }
        }
        Ok(())
    }

    /// The ref_counts, and the numbers of units and blocks, are those of the tables.
    fn check_counts(&self) -> Check {
        let tables = || self.tables.iter().map(|(table, _)| table).chain(&self.hoard);
        let states = self.before().states;
        let (mut in_use, mut evictable, mut memory) = (0, 0, 0);
        for (group, of) in self.config.groups.iter().enumerate() {
            let lists = || tables().map(|table| table.blocks_of_group(group));
            prop_assert_eq!(self.pool.check_ref_counts_of_group(group, lists()), Ok(()));
            let used: HashSet<_> = lists().flatten().collect();
            let cached = states[group].iter().filter(|state| **state == BlockState::Evictable).count();
            let usage = self.pool.usage(group);
            prop_assert_eq!((usage.in_use, usage.evictable), (used.len(), cached), "group {}", group);
            in_use += used.len() * of.units;
            evictable += cached * of.units;
            memory += self.slots[group].with_memory() * of.units;
        }
        prop_assert_eq!(self.pool.check_ref_counts(tables().map(BlockTable::blocks)), Ok(()));
        prop_assert_eq!(self.pool.blocks(), self.config.units);
        prop_assert_eq!((self.pool.in_use(), self.pool.evictable()), (in_use, evictable));
        prop_assert_eq!(self.pool.available(), self.config.units - in_use);
        prop_assert!(memory <= self.config.units, "{} units have memory", memory);
        Ok(())
    }

    /// Every token has its content in every group that still sees it, and there are no more blocks than that takes.
    fn check_table(&self, table: &BlockTable, model: &Model) -> Check {
        prop_assert_eq!(table.len(), model.written.len());
        prop_assert_eq!(table.salts(), &model.salts);
        let block_size = self.pool.block_size();
        let views = self.config.views(model.kind);
        for (group, view) in views.iter().enumerate() {
            let span = table.span_of_group(group);
            prop_assert_eq!((span.start(table.len()), span.sink_tokens()), (view.start(table.len()), view.sinks()));
            let (sinks, first_visible) = match view.is_all() {
                true => (0, model.freed),
                false => (view.sinks(), view.start(table.len())),
            };
            for (position, &what) in model.written.iter().enumerate() {
                match table.slot_of_group(group, position) {
                    Some(slot) => {
                        let what = in_group(group, what);
                        prop_assert_eq!(self.slots[group].get(slot), what, "position {} of group {}", position, group);
                    }
                    None => prop_assert!(
                        position >= sinks && position < first_visible,
                        "{} is still visible in group {}",
                        position,
                        group
                    ),
                }
            }
            prop_assert_eq!(table.slot_of_group(group, table.capacity()), None);
            // As many blocks as the tokens need, minus those that the window has passed.
            let whole = self.pool.blocks_for(table.len());
            let passed = (first_visible / block_size).saturating_sub(self.pool.blocks_for(sinks));
            let reserved = table.capacity() / block_size - whole;
            prop_assert_eq!(table.blocks_of_group(group).len(), whole - passed + reserved, "group {}", group);
            let freed = table.freed_blocks_of_group(group);
            let start = if passed > 0 { self.pool.blocks_for(sinks) } else { whole + reserved };
            prop_assert_eq!(freed, start..start + passed, "group {}", group);
        }
        let first = |position| (table.slot(position), table.slot_of_group(0, position));
        prop_assert!((0..=table.capacity()).map(first).all(|(slot, of_first)| slot == of_first));
        prop_assert_eq!(
            (table.blocks(), table.freed_blocks()),
            (table.blocks_of_group(0), table.freed_blocks_of_group(0))
        );
        Ok(())
    }
}

fn ref_counts(states: &[Vec<BlockState>]) -> Vec<u32> {
    let ref_count = |state: &BlockState| if let BlockState::InUse(n) = *state { n } else { 0 };
    states.iter().flatten().map(ref_count).collect()
}

/// The blocks of a table in each group.
pub(crate) fn blocks(table: &BlockTable) -> Vec<Vec<BlockId>> {
    (0..table.pool().groups().len()).map(|group| table.blocks_of_group(group).to_vec()).collect()
}

/// The blocks that a table has in a group, each with its number in the sequence.
pub(crate) fn numbered(table: &BlockTable, group: usize) -> impl Iterator<Item = (usize, BlockId)> + '_ {
    let freed = table.freed_blocks_of_group(group);
    let number = move |at: usize| if at < freed.start { at } else { at + freed.len() };
    table.blocks_of_group(group).iter().enumerate().map(move |(at, &block)| (number(at), block))
}

/// The block of a group with this number in the sequence, unless it was freed.
pub(crate) fn block(table: &BlockTable, group: usize, number: usize) -> Option<BlockId> {
    numbered(table, group).find(|&(of, _)| of == number).map(|(_, block)| block)
}

/// The slots of a position, one of each group that has not freed it.
pub(crate) fn slots(table: &BlockTable, position: usize) -> Vec<Option<usize>> {
    (0..table.pool().groups().len()).map(|group| table.slot_of_group(group, position)).collect()
}

/// Those blocks of a table that are cached.
pub(crate) fn cached_blocks(table: &BlockTable, router: &Router) -> HashSet<GroupBlock> {
    let of = |(group, ids): (usize, Vec<_>)| ids.into_iter().map(move |block| GroupBlock { group, block });
    blocks(table).into_iter().enumerate().flat_map(of).filter(|&block| router.has(block)).collect()
}
