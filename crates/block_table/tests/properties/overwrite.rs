//! The action that writes positions again.

use std::ops::Range;

use block_table::{BlockState, GroupBlock, ReserveError};
use proptest::prelude::*;

use crate::Check;
use crate::model::in_group;
use crate::world::{World, block, cached_blocks, slots};

impl World {
    /// Makes positions writable, and writes all of them that have a slot.
    pub(crate) fn make_writable(&mut self, t: usize, positions: Range<usize>) -> Check {
        let table = &mut self.tables[t].0;
        let block_size = self.pool.block_size();
        self.orphans |= positions.start / block_size + 1 < table.capacity() / block_size;
        let (len, capacity) = (table.len(), table.capacity());
        let before: Vec<_> = (0..capacity).map(|at| slots(table, at)).collect();
        let done = table.make_writable(positions.clone());
        prop_assert_eq!((table.len(), table.capacity()), (len, capacity));
        match done {
            // Some blocks may have been replaced by copies. `check` compares their content like any other.
            Err(ReserveError::OutOfBlocks(error)) => {
                prop_assert!(error.requested > error.available);
                prop_assert_eq!(error.available, self.pool.available());
                return Ok(());
            }
            Err(ReserveError::Storage(error)) => return self.check_failure(&error),
            Ok(()) => {}
        }
        self.follow_events()?;
        for (at, before) in before.iter().enumerate() {
            let now = slots(&self.tables[t].0, at);
            let has_slot = |slots: &[Option<usize>]| slots.iter().map(Option::is_some).collect::<Vec<_>>();
            prop_assert_eq!(has_slot(&now), has_slot(before));
            if positions.contains(&at) && now.iter().any(Option::is_some) {
                self.overwrite(t, at, &now)?;
            }
        }
        let (table, model) = &mut self.tables[t];
        if !positions.is_empty() && positions.start < len && model.private.is_none() {
            model.private = Some(cached_blocks(table, &self.router));
        }
        Ok(())
    }

    /// Writes a position again in the groups that have a slot for it. No other table sees that.
    fn overwrite(&mut self, t: usize, at: usize, slots: &[Option<usize>]) -> Check {
        self.serial += 1;
        let (what, number) = (u64::from(self.serial) << 32, at / self.pool.block_size());
        let snapshot = self.pool.snapshot();
        for (group, (slot, states)) in slots.iter().zip(snapshot.groups()).enumerate() {
            let (Some(slot), Some(id)) = (*slot, block(&self.tables[t].0, group, number)) else { continue };
            prop_assert_eq!(
                states[id.index()],
                BlockState::InUse(1),
                "another table uses the block of position {} in group {}",
                at,
                group
            );
            let stored = self.router.has(GroupBlock { group, block: id });
            prop_assert!(!stored, "the block of position {} in group {} is cached", at, group);
            self.slots[group].write(slot, in_group(group, what));
        }
        if let Some(written) = self.tables[t].1.written.get_mut(at) {
            *written = what;
        }
        Ok(())
    }
}
