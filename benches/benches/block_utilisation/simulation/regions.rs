//! Contiguous regions of one address space, the lowest that fits first.

pub(crate) struct Regions {
    /// Free regions `(start, len)`, by their start, never side by side.
    free: Vec<(usize, usize)>,
}

impl Regions {
    pub(crate) fn new(len: usize) -> Self {
        Self { free: vec![(0, len)] }
    }

    /// The start of a region of `len`, if one is free.
    pub(crate) fn take(&mut self, len: usize) -> Option<usize> {
        let at = self.free.iter().position(|&(_, free)| free >= len)?;
        Some(self.cut(at, len))
    }

    /// Takes the `len` places from `start` on; says whether they were free.
    pub(crate) fn take_at(&mut self, start: usize, len: usize) -> bool {
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

    pub(crate) fn give_back(&mut self, start: usize, len: usize) {
        let at = self.free.partition_point(|&(other, _)| other < start);
        let joins_next = self.free.get(at).is_some_and(|&(next, _)| next == start + len);
        let joins_last = at > 0 && self.free[at - 1].0 + self.free[at - 1].1 == start;
        match (joins_last, joins_next) {
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
    fn what_is_given_back_joins_its_neighbours() {
        let mut memory = Regions::new(10);
        assert_eq!((memory.take(4), memory.take(4), memory.take(3)), (Some(0), Some(4), None));
        assert!(memory.take_at(8, 2) && !memory.take_at(8, 1));
        memory.give_back(0, 4);
        memory.give_back(8, 2);
        assert_eq!(memory.take(5), None, "four and two are free, and something between");
        memory.give_back(4, 4);
        assert_eq!(memory.take(10), Some(0));
    }
}
