//! Which cached block is evicted next when memory is needed: the policy is in this file only.
//!
//! First come the blocks that a window has passed: no sequence is likely to need them again. Then it is least recently
//! used: the evictable blocks are a list in the order in which their ref_count became 0. A sequence frees its blocks
//! from its end to its start. So within one sequence the tail is evicted before the head, and a child before its
//! parent, and a prefix that many sequences share stays longest.

use crate::prefix::Entry;

/// The evictable blocks of all groups, the next to be evicted first.
///
/// Two rings of links, one entry for each block, and entries 0 and 1, which are both ends of a ring each. Zeroed memory
/// never touched costs nothing, and every operation is a few writes.
#[derive(Debug)]
pub(crate) struct EvictionList {
    /// Link `i` has the `[older, newer]` links of entry `i - 2`; links 0 and 1 are the ends of the rings.
    links: Vec<[u32; 2]>,
    len: usize,
}

const OLDER: usize = 0;
const NEWER: usize = 1;

/// The ends of the ring of blocks that a window has passed, and of the others.
const PASSED: u32 = 0;
const OTHERS: u32 = 1;

impl EvictionList {
    pub(crate) fn empty(blocks: usize) -> Self {
        let mut links = vec![[0; 2]; blocks + 2];
        links[OTHERS as usize] = [OTHERS; 2];
        Self { links, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The block that is evicted next.
    #[inline]
    pub(crate) fn next_victim(&self) -> Option<Entry> {
        self.oldest(PASSED).or_else(|| self.oldest_used())
    }

    /// The oldest block that no window has passed.
    #[inline]
    pub(crate) fn oldest_used(&self) -> Option<Entry> {
        self.oldest(OTHERS)
    }

    #[inline]
    fn oldest(&self, ring: u32) -> Option<Entry> {
        Some(self.links[ring as usize][NEWER]).filter(|&link| link != ring).map(Self::entry)
    }

    /// Adds a block at the newest end: its ref_count has become 0. `passed` is whether a window has passed it.
    #[inline]
    pub(crate) fn insert(&mut self, entry: Entry, passed: bool) {
        let ring = if passed { PASSED } else { OTHERS };
        let link = Self::link(entry);
        let newest = self.links[ring as usize][OLDER];
        self.links[link as usize] = [newest, ring];
        self.links[newest as usize][NEWER] = link;
        self.links[ring as usize][OLDER] = link;
        self.len += 1;
    }

    /// Removes a block: it is in use again, or uncached.
    #[inline]
    pub(crate) fn remove(&mut self, entry: Entry) {
        let [older, newer] = self.links[Self::link(entry) as usize];
        self.links[older as usize][NEWER] = newer;
        self.links[newer as usize][OLDER] = older;
        self.len -= 1;
    }

    /// From the next one to be evicted to the last.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Entry> + '_ {
        [PASSED, OTHERS].into_iter().flat_map(move |ring| {
            let next = move |link: &u32| Some(self.links[*link as usize][NEWER]).filter(|&link| link != ring);
            std::iter::successors(next(&ring), next).map(Self::entry)
        })
    }

    #[inline]
    fn link(entry: Entry) -> u32 {
        entry as u32 + 2
    }

    #[inline]
    fn entry(link: u32) -> Entry {
        link as usize - 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passed_blocks_are_evicted_first_then_the_least_recently_used() {
        let mut list = EvictionList::empty(6);
        assert_eq!(list.next_victim(), None);
        for entry in [2, 0, 3, 1] {
            list.insert(entry, false);
        }
        list.remove(3);
        list.remove(2);
        list.insert(2, false);
        assert_eq!(list.iter().collect::<Vec<_>>(), [0, 1, 2]);
        list.insert(5, true);
        list.insert(4, true);
        assert_eq!(list.iter().collect::<Vec<_>>(), [5, 4, 0, 1, 2]);
        assert_eq!((list.next_victim(), list.oldest_used(), list.len()), (Some(5), Some(0), 5));
        list.remove(4);
        list.remove(5);
        assert_eq!((list.next_victim(), list.len()), (Some(0), 3));
    }
}
