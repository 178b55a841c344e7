//! Which blocks have memory.
//!
//! Groups that share a budget have address space for more blocks than they can have memory for at the same time. The
//! system provides the memory of a block when it is first written. When a group needs memory that another group's free
//! blocks have, it is given back to the system. So the process never has more memory than the budget.

use std::ops::Range;

use super::{Group, Ledger};
use crate::BlockId;
use crate::free::FreeBlocks;

const WORD: usize = 64;

/// The blocks of a group that have memory: one bit for each.
#[derive(Debug)]
pub(super) struct Resident {
    words: Vec<u64>,
    len: usize,
    /// The word at which the next search begins.
    next: usize,
}

impl Resident {
    pub(super) fn none(blocks: usize) -> Self {
        Self { words: vec![0; blocks.div_ceil(WORD)], len: 0, next: 0 }
    }

    /// How many blocks have memory.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn contains(&self, index: usize) -> bool {
        self.words[index / WORD] >> (index % WORD) & 1 == 1
    }

    pub(super) fn insert(&mut self, run: Range<usize>) {
        for index in run {
            let (word, bit) = (&mut self.words[index / WORD], 1 << (index % WORD));
            self.len += usize::from(*word & bit == 0);
            *word |= bit;
        }
    }

    fn remove(&mut self, index: usize) {
        let (word, bit) = (&mut self.words[index / WORD], 1 << (index % WORD));
        self.len -= usize::from(*word & bit != 0);
        *word &= !bit;
    }

    /// A block that is free and has memory; takes it out of both.
    fn take_free(&mut self, free: &mut FreeBlocks) -> Option<usize> {
        let words = self.words.len();
        let at = (0..words).map(|at| (self.next + at) % words).find(|&at| self.words[at] & free.word(at) != 0)?;
        let bit = (self.words[at] & free.word(at)).trailing_zeros() as usize;
        let index = at * WORD + bit;
        self.remove(index);
        self.next = at;
        free.remove(index);
        Some(index)
    }
}

impl Ledger {
    /// How many units of memory the blocks of all groups have.
    pub(crate) fn resident(&self) -> usize {
        self.groups.iter().map(|group| group.units * group.resident.as_ref().map_or(0, Resident::len)).sum()
    }

    /// If the groups have more memory than the budget, chooses free blocks that lose theirs: of other groups than this
    /// one, if they have any. They are leftovers until the caller has given the memory back to the system.
    pub(super) fn give_back(&mut self, group: usize) {
        let groups = self.groups.len();
        let mut excess = self.resident().saturating_sub(self.budget);
        for of in (1..=groups).map(|after| (group + after) % groups) {
            while excess > 0 {
                let Group { resident, free, units, first, .. } = &mut self.groups[of];
                let Some(index) = resident.as_mut().and_then(|resident| resident.take_free(free)) else { break };
                excess = excess.saturating_sub(*units);
                self.ref_counts[*first + index] = 1;
                self.units_in_use += *units;
                self.leftovers.unneeded.push((of, BlockId::new(index)));
            }
        }
        // Evicted blocks become free as soon as the caller has dealt with them. Their memory is not needed either.
        while excess > 0 {
            let Some((of, id)) = self.leftovers.evicted.pop() else { return };
            let Group { resident, units, .. } = &mut self.groups[of];
            if let Some(resident) = resident {
                resident.remove(id.index());
            }
            excess = excess.saturating_sub(*units);
            self.leftovers.unneeded.push((of, id));
        }
    }
}
