//! A buddy allocator: contiguous regions whose sizes are powers of two. Two halves of a region that are both free are
//! merged (Knuth, "The Art of Computer Programming", volume 1, section 2.5).

use std::collections::BTreeSet;

pub(crate) struct Buddies {
    /// The starts of free regions of 2^i, at index i.
    free: Vec<BTreeSet<usize>>,
}

impl Buddies {
    /// `len` slots: one region for each bit that is set in `len`, the largest first.
    pub(crate) fn new(len: usize) -> Self {
        let mut free = vec![BTreeSet::new(); usize::BITS as usize];
        let mut start = 0;
        for order in (0..free.len()).rev().filter(|order| len >> order & 1 == 1) {
            free[order].insert(start);
            start += 1 << order;
        }
        Self { free }
    }

    /// Allocates a region of 2^`order` slots from the smallest free region that fits; returns its start.
    pub(crate) fn allocate(&mut self, order: usize) -> Option<usize> {
        let smallest = (order..self.free.len()).find(|&order| !self.free[order].is_empty())?;
        let start = self.free[smallest].pop_first()?;
        for half in order..smallest {
            self.free[half].insert(start + (1 << half));
        }
        Some(start)
    }

    /// Frees a region, and merges it with its other half as long as that is free too.
    pub(crate) fn free(&mut self, start: usize, order: usize) {
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
    fn regions_are_split_and_merged() {
        let mut memory = Buddies::new(8 + 2);
        let (a, b, c) = (memory.allocate(1), memory.allocate(1), memory.allocate(2));
        assert_eq!((a, b, c), (Some(8), Some(0), Some(4)));
        assert_eq!(memory.allocate(2), None, "two slots are free, but no region of four");
        memory.free(0, 1);
        memory.free(4, 2);
        assert_eq!(memory.allocate(3), Some(0));
    }
}
