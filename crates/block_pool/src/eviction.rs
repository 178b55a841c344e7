//! Which cached block is evicted next when memory is needed: the policy is in this file only.
//!
//! It is least recently used. The evictable blocks are a list in the order in which their ref_count became 0. A
//! sequence frees its blocks from its end to its start. So within one sequence the tail is evicted before the head, and
//! a child before its parent, and a prefix that many sequences share stays longest.

use crate::BlockId;

/// The evictable blocks, the next to be evicted first.
///
/// A ring of links, one entry for each block, and entry 0, which is both ends of the list. Zeroed memory is the empty
/// list, and every operation is a few writes.
#[derive(Debug)]
pub(crate) struct EvictionList {
    /// Entry `i` has the `[older, newer]` entries of the block with index `i - 1`; entry 0 is both ends of the list.
    links: Vec<[u32; 2]>,
    len: usize,
}

const OLDER: usize = 0;
const NEWER: usize = 1;

impl EvictionList {
    pub(crate) fn empty(blocks: usize) -> Self {
        Self { links: vec![[0; 2]; blocks + 1], len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The block that is evicted next.
    pub(crate) fn next_victim(&self) -> Option<BlockId> {
        Self::block(self.links[0][NEWER])
    }

    /// Adds a block at the newest end: its ref_count has become 0.
    pub(crate) fn insert(&mut self, id: BlockId) {
        let entry = Self::entry(id);
        let newest = self.links[0][OLDER];
        self.links[entry as usize] = [newest, 0];
        self.links[newest as usize][NEWER] = entry;
        self.links[0][OLDER] = entry;
        self.len += 1;
    }

    /// Removes a block: it is in use again, or uncached.
    pub(crate) fn remove(&mut self, id: BlockId) {
        let [older, newer] = self.links[Self::entry(id) as usize];
        self.links[older as usize][NEWER] = newer;
        self.links[newer as usize][OLDER] = older;
        self.len -= 1;
    }

    /// From the oldest to the newest.
    pub(crate) fn iter(&self) -> impl Iterator<Item = BlockId> + '_ {
        let next = |id: &BlockId| Self::block(self.links[Self::entry(*id) as usize][NEWER]);
        std::iter::successors(self.next_victim(), next)
    }

    fn entry(id: BlockId) -> u32 {
        id.index() as u32 + 1
    }

    fn block(entry: u32) -> Option<BlockId> {
        entry.checked_sub(1).map(|index| BlockId::new(index as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_block_is_evicted_first() {
        let mut list = EvictionList::empty(4);
        assert_eq!(list.next_victim(), None);
        for index in [2, 0, 3, 1] {
            list.insert(BlockId::new(index));
        }
        list.remove(BlockId::new(3));
        list.remove(BlockId::new(2));
        list.insert(BlockId::new(2));
        assert_eq!(list.iter().map(BlockId::index).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(list.len(), 3);
    }
}
