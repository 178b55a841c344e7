//! Contiguous regions whose sizes are powers of two: halves of a region that are both free become one again (Knuth, "The
//! Art of Computer Programming", volume 1, section 2.5).

use std::collections::BTreeSet;

pub(crate) struct Buddies {
    /// The starts of free regions of 2^i, at index i.
    free: Vec<BTreeSet<usize>>,
}

impl Buddies {
    /// `len` places: one region for each bit that is set in it, the largest first.
    pub(crate) fn new(len: usize) -> Self {
        let mut free = vec![BTreeSet::new(); usize::BITS as usize];
        let mut start = 0;
        for order in (0..free.len()).rev().filter(|order| len >> order & 1 == 1) {
            free[order].insert(start);
            start += 1 << order;
        }
        Self { free }
    }

    /// The start of a region of 2^`order`, out of the smallest that is free.
    pub(crate) fn take(&mut self, order: usize) -> Option<usize> {
        let found = (order..self.free.len()).find(|&order| !self.free[order].is_empty())?;
        let start = self.free[found].pop_first()?;
        for half in order..found {
            self.free[half].insert(start + (1 << half));
        }
        Some(start)
    }

    pub(crate) fn give_back(&mut self, start: usize, order: usize) {
        let (mut start, mut order) = (start, order);
        while self.free[order].remove(&(start ^ (1 << order))) {
            start &= !(1 << order);
            order += 1;
        }
        self.free[order].insert(start);
    }
}

#[cfg(test)]
#[allow(unused_imports, dead_code, reason = "a benchmark is built with cfg(test) and without its tests")]
mod tests {
    use super::*;

    #[test]
    fn halves_are_split_and_become_whole_again() {
        let mut memory = Buddies::new(8 + 2);
        let (a, b, c) = (memory.take(1), memory.take(1), memory.take(2));
        assert_eq!((a, b, c), (Some(8), Some(0), Some(4)));
        assert_eq!(memory.take(2), None, "two are free, and no four side by side");
        memory.give_back(0, 1);
        memory.give_back(4, 2);
        assert_eq!(memory.take(3), Some(0));
    }
}
