//! A sequence, and what a model would write to its slots.

#![allow(clippy::unwrap_used, dead_code)]

use block_table::{BlockPool, BlockTable, Salt, TableOptions};

use super::{Slots, content};

/// A sequence, and what is written to its slots: it depends on its salt.
pub(crate) struct Sequence {
    pub(crate) table: BlockTable,
    /// The salt, and the tokens.
    pub(crate) all: Vec<u32>,
}

impl Sequence {
    pub(crate) fn new(pool: &BlockPool, salt: u32) -> Self {
        let mut options = TableOptions::default();
        if salt > 0 {
            options = options.salt(Salt::new(&[salt as u8]));
        }
        Self { table: BlockTable::with_options(pool, &options), all: vec![salt] }
    }

    pub(crate) fn tokens(&self) -> &[u32] {
        &self.all[1..]
    }

    /// Computes the tokens that the table does not have. Returns whether the pool had room.
    pub(crate) fn compute(&mut self, slots: &[Slots]) -> bool {
        let done = self.table.len();
        if self.table.reserve(self.tokens().len() - done).is_err() {
            return false;
        }
        for (group, slots) in slots.iter().enumerate() {
            for position in done..self.tokens().len() {
                let slot = self.table.slot_of_group(group, position).unwrap();
                slots.write(slot, content(&self.all[..position + 2]));
            }
        }
        self.table.commit_tokens(&self.all[done + 1..]).unwrap();
        true
    }

    /// Every slot of the table has what was written for its tokens.
    pub(crate) fn check(&self, slots: &[Slots]) {
        for (group, slots) in slots.iter().enumerate() {
            for position in 0..self.table.len() {
                if let Some(slot) = self.table.slot_of_group(group, position) {
                    assert_eq!(slots.get(slot), content(&self.all[..position + 2]), "group {group}, {position}");
                }
            }
        }
    }
}
