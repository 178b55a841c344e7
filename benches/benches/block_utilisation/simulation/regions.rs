//! A first-fit allocator of contiguous regions in one address space.

pub(crate) struct Regions {
    /// Free regions `(start, len)`, sorted by their start; adjacent ones are merged.
    free: Vec<(usize, usize)>,
}

impl Regions {
    pub(crate) fn new(len: usize) -> Self {
        Self { free: vec![(0, len)] }
    }

    /// Allocates `len` slots at the lowest start that fits; returns the start.
    pub(crate) fn allocate(&mut self, len: usize) -> Option<usize> {
        let at = self.free.iter().position(|&(_, free)| free >= len)?;
        Some(self.cut(at, len))
    }

    /// Allocates the `len` slots from `start` on, if they are the start of a free region; returns whether it did.
    pub(crate) fn allocate_at(&mut self, start: usize, len: usize) -> bool {
        match self.free.binary_search_by_key(&start, |&(start, _)| start) {
            Ok(at) if self.free[at].1 >= len => {
                self.cut(at, len);
                true
            }
            _ => false,
        }
    }

    fn cut(&mut self, at: usize, len: usize) -> usize {
        let (start, free) = self.free[at];
        if free == len {
            self.free.remove(at);
        } else {
            self.free[at] = (start + len, free - len);
        }
        start
    }

    /// Frees a region, and merges it with its neighbours if they are free.
    pub(crate) fn free(&mut self, start: usize, len: usize) {
        let at = self.free.partition_point(|&(other, _)| other < start);
        let touches_next = self.free.get(at).is_some_and(|&(next, _)| next == start + len);
        let touches_previous = at > 0 && self.free[at - 1].0 + self.free[at - 1].1 == start;
        match (touches_previous, touches_next) {
            (true, true) => {
                let (_, next) = self.free.remove(at);
                self.free[at - 1].1 += len + next;
            }
            (true, false) => self.free[at - 1].1 += len,
            (false, true) => self.free[at] = (start, len + self.free[at].1),
            (false, false) => self.free.insert(at, (start, len)),
        }
    }
}

#[cfg(test)]
#[allow(unused_imports, dead_code, reason = "a benchmark is built with cfg(test) and without its tests")]
mod tests {
    use super::*;

    #[test]
    fn a_freed_region_is_merged_with_its_neighbours() {
        let mut memory = Regions::new(10);
        assert_eq!((memory.allocate(4), memory.allocate(4), memory.allocate(3)), (Some(0), Some(4), None));
        assert!(memory.allocate_at(8, 2) && !memory.allocate_at(8, 1));
        memory.free(0, 4);
        memory.free(8, 2);
        assert_eq!(memory.allocate(5), None, "four and two slots are free, but not adjacent");
        memory.free(4, 4);
        assert_eq!(memory.allocate(10), Some(0));
    }
}
