//! Which blocks are free, and which of them to hand out first.
//!
//! One bit per block. A core reads a long run of memory several times faster than scattered blocks, so a sequence's
//! blocks should lie side by side. Two rules give that without any bookkeeping per sequence:
//!
//! 1. a growing sequence gets the block right behind its last one, if that is free;
//! 2. otherwise it starts in a word of 64 blocks that is wholly free, where nobody else is about to grow into its
//!    neighbours; when there is no such word, in the lowest free block.
//!
//! Two summary bitmaps, one bit per word, find both kinds of word without a scan over the pool.

use crate::BlockId;

const WORD: usize = 64;

#[derive(Debug)]
pub(crate) struct FreeBlocks {
    /// One bit per block: free.
    words: Vec<u64>,
    /// One bit per word: some block of it is free.
    any: Vec<u64>,
    /// One bit per word: all its 64 blocks are free.
    whole: Vec<u64>,
    len: usize,
}

impl FreeBlocks {
    pub(crate) fn all(blocks: usize) -> Self {
        let words = blocks.div_ceil(WORD);
        let mut free = Self {
            words: vec![0; words],
            any: vec![0; words.div_ceil(WORD)],
            whole: vec![0; words.div_ceil(WORD)],
            len: blocks,
        };
        for (w, word) in free.words.iter_mut().enumerate() {
            let bits = (blocks - w * WORD).min(WORD);
            *word = low_bits(bits);
        }
        for w in 0..words {
            free.summarise(w);
        }
        free
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn contains(&self, id: BlockId) -> bool {
        self.words[id.index() / WORD] >> (id.index() % WORD) & 1 == 1
    }

    pub(crate) fn insert(&mut self, id: BlockId) {
        let w = id.index() / WORD;
        debug_assert!(!self.contains(id), "{id:?} is free already");
        self.words[w] |= 1 << (id.index() % WORD);
        self.len += 1;
        self.summarise(w);
    }

    /// Takes `n` blocks and hands each to `taken`; the caller has made sure that so many are free.
    pub(crate) fn take(&mut self, n: usize, after: Option<BlockId>, mut taken: impl FnMut(BlockId)) {
        debug_assert!(n <= self.len);
        let mut left = n;
        let mut next = after.map(|id| id.index() + 1);
        while left > 0 {
            // An exhausted run falls back to a fresh start; a fresh start always finds a free block.
            let start = next.filter(|&at| self.run_at(at) > 0).unwrap_or_else(|| self.fresh_start());
            let (w, bit) = (start / WORD, start % WORD);
            let run = self.run_at(start).min(left);
            debug_assert!(run > 0);
            if run == 0 {
                return;
            }
            self.words[w] &= !(low_bits(run) << bit);
            self.len -= run;
            self.summarise(w);
            for index in start..start + run {
                taken(BlockId::new(index));
            }
            left -= run;
            next = Some(start + run);
        }
    }

    /// How many blocks are free from `at` on, to the end of its word.
    fn run_at(&self, at: usize) -> usize {
        let Some(word) = self.words.get(at / WORD) else {
            return 0;
        };
        (!(word >> (at % WORD))).trailing_zeros() as usize
    }

    fn fresh_start(&self) -> usize {
        let word = first_set(&self.whole).or_else(|| first_set(&self.any)).unwrap_or(0);
        word * WORD + (self.words[word].trailing_zeros() as usize % WORD)
    }

    fn summarise(&mut self, w: usize) {
        let (word, bit) = (self.words[w], 1 << (w % WORD));
        let set = |summary: &mut u64, on: bool| if on { *summary |= bit } else { *summary &= !bit };
        set(&mut self.any[w / WORD], word != 0);
        set(&mut self.whole[w / WORD], word == u64::MAX);
    }

    /// Whether the summaries and the length say what the bits say.
    pub(crate) fn is_consistent(&self) -> bool {
        let counted: usize = self.words.iter().map(|w| w.count_ones() as usize).sum();
        counted == self.len
            && self.words.iter().enumerate().all(|(w, &word)| {
                let bit = |summary: &[u64]| summary[w / WORD] >> (w % WORD) & 1 == 1;
                bit(&self.any) == (word != 0) && bit(&self.whole) == (word == u64::MAX)
            })
    }
}

fn low_bits(n: usize) -> u64 {
    if n >= WORD { u64::MAX } else { (1 << n) - 1 }
}

fn first_set(bits: &[u64]) -> Option<usize> {
    let at = bits.iter().position(|&b| b != 0)?;
    Some(at * WORD + bits[at].trailing_zeros() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(free: &mut FreeBlocks, n: usize, after: Option<usize>) -> Vec<usize> {
        let mut out = Vec::new();
        free.take(n, after.map(BlockId::new), |id| out.push(id.index()));
        assert!(free.is_consistent());
        out
    }

    #[test]
    fn a_growing_sequence_continues_right_behind_its_last_block() {
        let mut free = FreeBlocks::all(256);
        assert_eq!(take(&mut free, 3, None), [0, 1, 2]);
        assert_eq!(take(&mut free, 2, Some(2)), [3, 4]);
    }

    #[test]
    fn sequences_start_in_words_of_their_own() {
        let mut free = FreeBlocks::all(256);
        assert_eq!(take(&mut free, 2, None), [0, 1]);
        assert_eq!(take(&mut free, 2, None), [64, 65]);
        assert_eq!(take(&mut free, 1, Some(1)), [2]);
        assert_eq!(take(&mut free, 1, Some(65)), [66]);
    }

    #[test]
    fn a_run_crosses_words_and_a_crowded_pool_gives_its_lowest_blocks() {
        let mut free = FreeBlocks::all(130);
        assert_eq!(take(&mut free, 70, None), (0..70).collect::<Vec<_>>());
        free.insert(BlockId::new(5));
        assert_eq!(take(&mut free, 2, Some(129)), [5, 70]);
        assert_eq!(take(&mut free, 59, None), (71..130).collect::<Vec<_>>());
        assert_eq!(free.len(), 0);
    }
}
