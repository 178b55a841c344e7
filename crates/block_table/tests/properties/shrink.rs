//! Actions that make sequences shorter, or move them.

use block_table::{BlockTable, GroupBlock};
use proptest::prelude::*;

use crate::Check;
use crate::model::Model;
use crate::world::{World, blocks, cached_blocks, numbered, slots};

impl World {
    pub(crate) fn truncate(&mut self, t: usize, len: usize) -> Check {
        let loses = self.loses(t, len);
        let (table, model) = &mut self.tables[t];
        let before = (table.len(), blocks(table));
        match table.truncate(len) {
            Ok(()) => {
                if len < before.0 {
                    // The next tokens are new, so that the streams differ.
                    model.truncate(len);
                }
                prop_assert!(len == 0 || len >= model.freed);
            }
            Err(error) => {
                prop_assert!(loses, "the token at {} sees nothing that was freed", len);
                prop_assert!(error.needed < error.kept);
                prop_assert_eq!(before, (table.len(), blocks(table)));
            }
        }
        Ok(())
    }

    /// Whether the token at `len`, itself included, sees a position that was freed in some group. Only then a sequence
    /// cannot go back to this length.
    fn loses(&self, t: usize, len: usize) -> bool {
        let (table, model) = &self.tables[t];
        let views = self.config.views(model.kind);
        let mut positions = 0..(len + 1).min(table.len());
        positions.any(|at| {
            let mut groups = views.iter().zip(slots(table, at));
            groups.any(|(view, slot)| slot.is_none() && view.sees(len, at..at + 1))
        })
    }

    pub(crate) fn fork(&mut self, t: usize, len: usize) -> Check {
        let (before, loses) = (self.before(), self.loses(t, len));
        let (table, model) = &self.tables[t];
        match table.fork_at(len) {
            Ok(fork) => {
                prop_assert_eq!(self.pool.available(), before.available);
                let mut model = model.clone();
                model.truncate(len);
                self.tables.push((fork, model));
            }
            Err(error) => {
                prop_assert!(loses, "the token at {} sees nothing that was freed", len);
                prop_assert!(error.needed < error.kept);
                prop_assert_eq!(before, self.before());
            }
        }
        Ok(())
    }

    pub(crate) fn shrink_to(&mut self, t: usize, end: usize) -> Check {
        let table = &mut self.tables[t].0;
        let before = (table.len(), table.capacity(), self.pool.available());
        table.shrink_to(end);
        let capacity = end.max(before.0).next_multiple_of(self.pool.block_size());
        prop_assert_eq!((table.len(), table.capacity()), (before.0, capacity.min(before.1)));
        prop_assert!(self.pool.available() >= before.2);
        Ok(())
    }

    pub(crate) fn free_before(&mut self, t: usize, position: usize) -> Check {
        let (table, model) = &mut self.tables[t];
        let (len, had, block_size) = (table.len(), blocks(table), self.pool.block_size());
        table.free_before(position);
        if self.config.views(model.kind).iter().all(|view| view.is_all()) {
            let freed = position.min(len) / block_size * block_size;
            let more = freed.saturating_sub(model.freed) / block_size;
            let kept: Vec<_> = had.iter().map(|ids| ids[more..].to_vec()).collect();
            prop_assert_eq!(blocks(table), kept);
            self.orphans |= more > 0;
            model.freed = model.freed.max(freed);
        } else {
            prop_assert_eq!(blocks(table), had);
        }
        prop_assert_eq!(table.len(), len);
        Ok(())
    }

    pub(crate) fn swap_out(&mut self, t: usize) -> Check {
        self.tables[t].0.roll_back();
        let units = self.units(&self.tables[t].0);
        let table = &mut self.tables[t].0;
        let before = (table.len(), blocks(table));
        let stored = cached_blocks(table, &self.router);
        // How far the cached blocks of any group go without a gap.
        let of_group = |group: usize| {
            let is_next = |(at, (number, block)): &(usize, (usize, _))| {
                at == number && stored.contains(&GroupBlock { group, block: *block })
            };
            numbered(table, group).enumerate().take_while(is_next).count()
        };
        let cached = self.config.groups.iter().enumerate().map(|(group, _)| of_group(group)).max().unwrap_or(0);
        match table.swap_out() {
            Ok(swapped) => {
                prop_assert_eq!(table.len(), 0);
                prop_assert!(blocks(table).iter().all(Vec::is_empty));
                prop_assert_eq!((swapped.len(), swapped.blocks()), (before.0, units));
                let (_, model) = self.tables.swap_remove(t);
                self.swapped.push((swapped, model, cached));
            }
            Err(error) => {
                prop_assert_eq!(before, (table.len(), blocks(table)));
                self.check_failure(&error)?;
            }
        }
        Ok(())
    }

    /// How many units the blocks of a table take.
    fn units(&self, table: &BlockTable) -> usize {
        blocks(table).iter().zip(&self.config.groups).map(|(ids, of)| ids.len() * of.units).sum()
    }

    pub(crate) fn swap_in(&mut self, s: usize) -> Check {
        let before = self.before();
        match self.swapped[s].0.swap_in() {
            Ok(table) => {
                let (_, mut model, cached): (_, Model, _) = self.swapped.swap_remove(s);
                // Its first blocks that were cached are cached again.
                if model.private.is_some() {
                    let first = |group: usize| {
                        let first = numbered(&table, group).filter(move |(number, _)| *number < cached);
                        first.map(move |(_, block)| GroupBlock { group, block })
                    };
                    model.private = Some(self.groups().flat_map(first).collect());
                }
                self.tables.push((table, model));
            }
            Err(error) => self.check_refusal(&error, &before)?,
        }
        Ok(())
    }
}
