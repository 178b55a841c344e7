//! Which block is in which slot, and which leaves next.
//!
//! The places of blocks form a tree, as prefixes do. A place without a place after it is a leaf. Leaves leave first,
//! the least recently used before the others: what is needed to find another block stays.

use std::collections::{BTreeSet, HashMap};

use crate::keys::Bits;
use crate::slot::Said;

/// The slots of a file and what is in them.
#[derive(Debug, Default)]
pub(crate) struct Index {
    places: HashMap<Bits, Entry>,
    /// How many places follow each, which may itself be missing.
    children: HashMap<Bits, usize>,
    /// The places that no other follows, by their last use.
    leaves: BTreeSet<(u64, Bits)>,
    /// What each slot of the file has.
    slots: Vec<Slot>,
    /// Slots that have nothing.
    free: Vec<u64>,
    /// Counts uses.
    clock: u64,
    /// Blocks that have left, each with its group, if somebody wants to know.
    pub(crate) left: Option<Vec<(Bits, u32)>>,
}

/// What a slot has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// Nothing, or something that is being written.
    Empty,
    /// A block.
    Block { name: Bits, group: u32, stored: u64 },
}

/// A place that has a block in any group.
#[derive(Debug)]
struct Entry {
    parent: Bits,
    /// The slot of each group that has one.
    slots: Vec<(u32, u64)>,
    used: u64,
}

/// A slot to write to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) slot: u64,
    /// How many blocks left for it.
    pub(crate) evicted: u64,
    /// Whether the file becomes longer with it.
    pub(crate) is_new: bool,
}

impl Index {
    /// How many slots the file has.
    pub(crate) fn slots(&self) -> u64 {
        self.slots.len() as u64
    }

    /// How many of them have a block.
    pub(crate) fn blocks(&self) -> u64 {
        self.places.values().map(|entry| entry.slots.len() as u64).sum()
    }

    /// The slot of a block, and when it was stored.
    pub(crate) fn get(&self, name: &Bits, group: u32) -> Option<(u64, u64)> {
        let &(_, slot) = self.places.get(name)?.slots.iter().find(|(of, _)| *of == group)?;
        match self.slots.get(slot as usize) {
            Some(&Slot::Block { stored, .. }) => Some((slot, stored)),
            _ => None,
        }
    }

    /// Notes that a place is used.
    pub(crate) fn touch(&mut self, name: &Bits) {
        let Some(entry) = self.places.get_mut(name) else { return };
        self.clock += 1;
        if self.leaves.remove(&(entry.used, *name)) {
            self.leaves.insert((self.clock, *name));
        }
        entry.used = self.clock;
    }

    /// The index of a file whose slots have these blocks, or none.
    pub(crate) fn of(slots: Vec<Option<Said>>) -> Self {
        let mut index = Self { slots: vec![Slot::Empty; slots.len()], ..Self::default() };
        index.free.extend((0..slots.len() as u64).rev().filter(|&slot| slots[slot as usize].is_none()));
        let mut blocks: Vec<(u64, Said)> = (0..).zip(slots).filter_map(|(slot, said)| Some((slot, said?))).collect();
        // When they were used last is not known: when they were stored is the next best.
        blocks.sort_by_key(|(slot, said)| (said.stored, *slot));
        blocks.into_iter().for_each(|(slot, said)| index.insert(slot, said));
        index
    }

    /// Takes a slot to write to: one without a block or, if the file has `most` slots, that of a block that leaves.
    /// It is not the one that the new block follows, whose name is `parent`. `None` if all others are taken.
    pub(crate) fn take(&mut self, most: u64, parent: &Bits) -> Option<Taken> {
        let mut evicted = 0;
        loop {
            if let Some(slot) = self.free.pop() {
                return Some(Taken { slot, evicted, is_new: false });
            }
            if self.slots() < most {
                self.slots.push(Slot::Empty);
                return Some(Taken { slot: self.slots() - 1, evicted, is_new: true });
            }
            let (_, name) = self.leaves.iter().find(|(_, name)| name != parent)?;
            // Of the last group first.
            let &(_, slot) = self.places.get(name)?.slots.last()?;
            self.remove(slot);
            evicted += 1;
        }
    }

    /// Gives back a slot that was taken.
    pub(crate) fn give_back(&mut self, slot: u64) {
        self.free.push(slot);
    }

    /// Puts a block into a slot that has none. If another slot has the same block, this one stays empty.
    pub(crate) fn insert(&mut self, slot: u64, Said { name, parent, group, stored }: Said) {
        let is_new = !self.places.contains_key(&name);
        let entry = self.places.entry(name).or_insert_with(|| Entry { parent, slots: Vec::new(), used: 0 });
        if entry.slots.iter().any(|(of, _)| *of == group) {
            return self.give_back(slot);
        }
        entry.slots.push((group, slot));
        self.slots[slot as usize] = Slot::Block { name, group, stored };
        if is_new {
            if !self.children.contains_key(&name) {
                self.leaves.insert((0, name));
            }
            *self.children.entry(parent).or_default() += 1;
            if let Some(parent_entry) = self.places.get(&parent) {
                self.leaves.remove(&(parent_entry.used, parent));
            }
        }
        self.touch(&name);
    }

    /// Removes the block of a slot, which is free from then on.
    pub(crate) fn remove(&mut self, slot: u64) {
        let Some(of @ &mut Slot::Block { name, group, .. }) = self.slots.get_mut(slot as usize) else { return };
        *of = Slot::Empty;
        self.free.push(slot);
        if let Some(left) = &mut self.left {
            left.push((name, group));
        }
        let Some(entry) = self.places.get_mut(&name) else { return };
        entry.slots.retain(|&(of, _)| of != group);
        if !entry.slots.is_empty() {
            return;
        }
        let (parent, used) = (entry.parent, entry.used);
        self.places.remove(&name);
        self.leaves.remove(&(used, name));
        if let Some(children) = self.children.get_mut(&parent) {
            *children -= 1;
            if *children == 0 {
                self.children.remove(&parent);
                if let Some(entry) = self.places.get(&parent) {
                    self.leaves.insert((entry.used, parent));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(name: u8, parent: u8, group: u32) -> Said {
        Said { name: [name; 32], parent: [parent; 32], group, stored: 0 }
    }

    /// Stores a block and returns the number of blocks that left.
    fn store(index: &mut Index, most: u64, said: Said) -> u64 {
        let taken = index.take(most, &said.parent).unwrap();
        index.insert(taken.slot, said);
        taken.evicted
    }

    fn names(index: &Index) -> Vec<u8> {
        let mut names: Vec<u8> = index.places.keys().map(|name| name[0]).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn the_least_recently_used_leaf_leaves() {
        // 1 <- 2 <- 3, and 1 <- 4.
        let mut index = Index::default();
        for (name, parent) in [(1, 0), (2, 1), (3, 2), (4, 1)] {
            assert_eq!(store(&mut index, 4, said(name, parent, 0)), 0);
        }
        index.touch(&[3; 32]);
        assert_eq!(store(&mut index, 4, said(5, 0, 0)), 1);
        assert_eq!(names(&index), [1, 2, 3, 5]);
        assert_eq!(store(&mut index, 4, said(6, 0, 0)), 1);
        assert_eq!(names(&index), [1, 2, 5, 6]);
        // The last use of what follows was later, but 2 has become a leaf, and 5 is older than nothing else.
        assert_eq!(store(&mut index, 4, said(7, 0, 0)), 1);
        assert_eq!(names(&index), [1, 5, 6, 7]);
        assert_eq!((index.slots(), index.blocks()), (4, 4));
    }

    #[test]
    fn groups_of_a_place_leave_one_after_the_other() {
        let mut index = Index::default();
        for group in [0, 1] {
            store(&mut index, 3, said(1, 0, group));
        }
        store(&mut index, 3, said(2, 1, 0));
        assert!(index.get(&[1; 32], 1).is_some());
        // 2 is the leaf.
        assert_eq!(store(&mut index, 3, said(3, 0, 0)), 1);
        assert_eq!(store(&mut index, 3, said(4, 0, 0)), 1);
        assert_eq!((index.get(&[1; 32], 0).is_some(), index.get(&[1; 32], 1)), (true, None));
    }

    #[test]
    fn a_file_is_read_in_any_order() {
        let mut slots = vec![Some(said(3, 2, 0)), None, Some(said(1, 0, 0)), Some(said(2, 1, 0)), Some(said(1, 0, 0))];
        slots.reverse();
        let mut index = Index::of(slots);
        assert_eq!((index.blocks(), index.slots(), index.free.len()), (3, 5, 2));
        let leaves: Vec<u8> = index.leaves.iter().map(|(_, name)| name[0]).collect();
        assert_eq!(leaves, [3]);
        // What does not follow any other is not kept for it.
        index.remove(index.get(&[2; 32], 0).unwrap().0);
        let mut leaves: Vec<u8> = index.leaves.iter().map(|(_, name)| name[0]).collect();
        leaves.sort_unstable();
        assert_eq!(leaves, [1, 3]);
    }

    #[test]
    fn a_prefix_that_is_longer_than_the_file_keeps_its_beginning() {
        let mut index = Index::default();
        for name in 1..4 {
            store(&mut index, 3, said(name, name - 1, 0));
        }
        assert_eq!(index.take(3, &[3; 32]), None);
        assert_eq!(names(&index), [1, 2, 3]);
        assert_eq!(index.take(3, &[2; 32]).map(|taken| taken.evicted), Some(1));
    }

    #[test]
    fn taken_slots_are_no_ones() {
        let mut index = Index::default();
        let first = index.take(1, &[0; 32]).unwrap();
        assert_eq!((first.slot, first.is_new, index.take(1, &[0; 32])), (0, true, None));
        index.give_back(first.slot);
        assert_eq!(index.take(1, &[0; 32]), Some(Taken { slot: 0, evicted: 0, is_new: false }));
    }
}
