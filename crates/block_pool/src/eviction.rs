//! Which remembered block gives way when memory is needed: the one place that knows the policy.
//!
//! Least recently used. The blocks that nobody holds are a list in the order in which they were let go. A sequence
//! lets its blocks go from its end to its start, so that within one sequence the tail gives way before the head, a child
//! before its parent, and a prefix that many share lives longest.

use crate::BlockId;

/// The remembered blocks, the next to give way first.
///
/// A ring of links, one entry for each block and one in front of them that is both ends of the list. Zeroed memory is
/// the empty list, and every operation is a few writes.
#[derive(Debug)]
pub(crate) struct Remembered {
    /// `[older, newer]` of the block with the index one less; 0 is the ring's fixed point.
    links: Vec<[u32; 2]>,
    len: usize,
}

const OLDER: usize = 0;
const NEWER: usize = 1;

impl Remembered {
    pub(crate) fn none(blocks: usize) -> Self {
        Self { links: vec![[0; 2]; blocks + 1], len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The block whose turn it is to give way.
    pub(crate) fn next_victim(&self) -> Option<BlockId> {
        Self::block(self.links[0][NEWER])
    }

    /// Nobody holds the block any more.
    pub(crate) fn insert(&mut self, id: BlockId) {
        let place = Self::place(id);
        let newest = self.links[0][OLDER];
        self.links[place as usize] = [newest, 0];
        self.links[newest as usize][NEWER] = place;
        self.links[0][OLDER] = place;
        self.len += 1;
    }

    /// Somebody holds the block again, or it is forgotten.
    pub(crate) fn remove(&mut self, id: BlockId) {
        let [older, newer] = self.links[Self::place(id) as usize];
        self.links[older as usize][NEWER] = newer;
        self.links[newer as usize][OLDER] = older;
        self.len -= 1;
    }

    /// From the oldest to the newest.
    pub(crate) fn iter(&self) -> impl Iterator<Item = BlockId> + '_ {
        let next = |id: &BlockId| Self::block(self.links[Self::place(*id) as usize][NEWER]);
        std::iter::successors(self.next_victim(), next)
    }

    fn place(id: BlockId) -> u32 {
        id.index() as u32 + 1
    }

    fn block(place: u32) -> Option<BlockId> {
        place.checked_sub(1).map(|index| BlockId::new(index as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unheld_gives_way_first() {
        let mut remembered = Remembered::none(4);
        assert_eq!(remembered.next_victim(), None);
        for index in [2, 0, 3, 1] {
            remembered.insert(BlockId::new(index));
        }
        remembered.remove(BlockId::new(3));
        remembered.remove(BlockId::new(2));
        remembered.insert(BlockId::new(2));
        assert_eq!(remembered.iter().map(BlockId::index).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(remembered.len(), 3);
    }
}
