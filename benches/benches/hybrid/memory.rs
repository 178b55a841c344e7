//! Memory that groups share or that is split between them, and the sequences in it.

use anyhow::Result;
use paged_attention::{BlockPool, BlockTable, ReserveError, TableOptions};

use crate::model::{BLOCK_SIZE, Model};

/// One pool of all groups, or one pool for each group.
pub(crate) struct Memory {
    pools: Vec<BlockPool>,
}

impl Memory {
    /// All groups share one budget.
    pub(crate) fn shared(pool: BlockPool) -> Self {
        Self { pools: vec![pool] }
    }

    /// Every fixed split of `units` units: for each number of blocks of the windowed layers, the rest is for the others.
    /// Each part is a pool of its own. Splits that differ by less than a block of the windowed layers are not tried,
    /// because a smaller rest holds nothing more.
    pub(crate) fn splits(model: &Model, units: usize) -> impl Iterator<Item = Result<Self>> {
        let [windowed, full] = model.groups();
        (1..=units.saturating_sub(full.units) / windowed.units).map(move |blocks| {
            let units_of_windowed = blocks * windowed.units;
            let pools = [(units_of_windowed, windowed), (units - units_of_windowed, full)];
            let pools = pools.into_iter().map(|(units, group)| Ok(BlockPool::of_groups(units, BLOCK_SIZE, &[group])?));
            Ok(Self { pools: pools.collect::<Result<_>>()? })
        })
    }

    /// How many units the blocks in use take.
    pub(crate) fn in_use(&self) -> usize {
        self.pools.iter().map(BlockPool::in_use).sum()
    }

    /// How many units of real memory the blocks have.
    pub(crate) fn resident(&self) -> usize {
        self.pools.iter().map(BlockPool::resident).sum()
    }
}

/// A sequence: one table in each pool. Dropping it ends it.
pub(crate) struct Sequence {
    tables: Vec<BlockTable>,
}

impl Sequence {
    /// Its tables are private: no two sequences here have a prefix in common, and a block that stays cached after its
    /// sequence has ended would only have to be evicted again.
    pub(crate) fn new(memory: &Memory) -> Self {
        let private = TableOptions::default().private();
        Self { tables: memory.pools.iter().map(|pool| BlockTable::with_options(pool, &private)).collect() }
    }

    /// How many tokens it holds.
    pub(crate) fn len(&self) -> usize {
        self.tables.first().map_or(0, BlockTable::len)
    }

    /// Allocates slots for `n` tokens in all groups. Returns whether there was room; if not, nothing changes.
    pub(crate) fn reserve(&mut self, n: usize) -> Result<bool> {
        for table in &mut self.tables {
            match table.reserve(n) {
                Ok(()) => {}
                Err(ReserveError::OutOfBlocks(_)) => {
                    self.tables.iter_mut().for_each(BlockTable::roll_back);
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
            // A pool that refuses too late, and leaves a group without a slot, would have too good numbers here.
            let (last, groups) = (table.len() + n - 1, table.pool().groups().len());
            let has_slots = (0..groups).all(|group| table.slot_of_group(group, last).is_some());
            anyhow::ensure!(has_slots, "a group has no slot for token {last}");
        }
        Ok(true)
    }

    /// The next `n` tokens were computed.
    pub(crate) fn commit(&mut self, n: usize) -> Result<()> {
        Ok(self.tables.iter_mut().try_for_each(|table| table.commit(n))?)
    }

    /// Does both. Returns whether there was room.
    pub(crate) fn grow(&mut self, n: usize) -> Result<bool> {
        let has_room = self.reserve(n)?;
        if has_room {
            self.commit(n)?;
        }
        Ok(has_room)
    }
}
