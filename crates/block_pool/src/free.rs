//! Which blocks are free, and in which order they are allocated.
//!
//! There is one bit per block. A core reads a long run of memory several times faster than scattered blocks, so a
//! sequence's blocks should be adjacent. Two rules achieve that without any bookkeeping per sequence:
//!
//! 1. A growing sequence gets the block directly after its last one, if that is free.
//! 2. Otherwise it starts in a word of 64 blocks that is wholly free, where no other sequence is about to grow into the
//!    blocks that follow. If there is no such word, it gets the lowest free block.
//!
//! Two summary bitmaps, one bit per word, find both kinds of word without a scan over the pool.

use std::ops::Range;

use crate::BlockId;

const WORD: usize = 64;

#[derive(Debug)]
pub(crate) struct FreeBlocks {
    /// One bit per block: the block is free.
    words: Vec<u64>,
    /// One bit per word: at least one of its blocks is free.
    any: Vec<u64>,
    /// One bit per word: all its 64 blocks are free.
    whole: Vec<u64>,
    len: usize,
    blocks: usize,
}

/// Blocks of one word that are about to become free.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pending {
    word: usize,
    bits: u64,
    /// How many bits are set. Kept here because counting them is a dozen instructions on a baseline x86-64.
    count: usize,
}

impl FreeBlocks {
    pub(crate) fn all(blocks: usize) -> Self {
        let words = blocks.div_ceil(WORD);
        let mut free = Self {
            words: vec![0; words],
            any: vec![0; words.div_ceil(WORD)],
            whole: vec![0; words.div_ceil(WORD)],
            len: 0,
            blocks,
        };
        for w in 0..words {
            let n = (blocks - w * WORD).min(WORD);
            free.insert_word(w, low_bits(n), n);
        }
        free
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// How many blocks there are, free or not.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// The free blocks from `64 * at` on, one bit for each.
    pub(crate) fn word(&self, at: usize) -> u64 {
        self.words[at]
    }

    /// Takes a certain free block.
    pub(crate) fn remove(&mut self, index: usize) {
        self.remove_word(index / WORD, 1 << (index % WORD), 1);
    }

    pub(crate) fn contains(&self, id: BlockId) -> bool {
        self.words[id.index() / WORD] >> (id.index() % WORD) & 1 == 1
    }

    #[cfg(test)]
    fn insert(&mut self, id: BlockId) {
        self.insert_word(id.index() / WORD, 1 << (id.index() % WORD), 1);
    }

    /// Makes a block free, batched with others of the same word: nothing is written until the word changes or
    /// [`finish`](Self::finish) is called.
    #[inline]
    pub(crate) fn insert_with(&mut self, pending: &mut Pending, id: BlockId) {
        let w = id.index() / WORD;
        if w != pending.word {
            self.finish(*pending);
            *pending = Pending { word: w, bits: 0, count: 0 };
        }
        pending.bits |= 1 << (id.index() % WORD);
        pending.count += 1;
    }

    #[inline]
    pub(crate) fn finish(&mut self, pending: Pending) {
        let Pending { word, bits, count } = pending;
        if bits != 0 {
            self.insert_word(word, bits, count);
        }
    }

    #[inline]
    fn insert_word(&mut self, w: usize, bits: u64, count: usize) {
        debug_assert!(self.words[w] & bits == 0, "a block is free already");
        self.len += count;
        let word = &mut self.words[w];
        *word |= bits;
        let (summary, bit) = (w / WORD, 1 << (w % WORD));
        self.any[summary] |= bit;
        if *word == u64::MAX {
            self.whole[summary] |= bit;
        }
    }

    #[inline]
    fn remove_word(&mut self, w: usize, bits: u64, count: usize) {
        self.len -= count;
        let word = &mut self.words[w];
        *word &= !bits;
        let (summary, bit) = (w / WORD, 1 << (w % WORD));
        self.whole[summary] &= !bit;
        if *word == 0 {
            self.any[summary] &= !bit;
        }
    }

    /// Allocates `n` blocks and passes each run of adjacent blocks to `add_run`. The caller has checked that `n` are
    /// free.
    #[inline]
    pub(crate) fn allocate(&mut self, n: usize, after: Option<BlockId>, mut add_run: impl FnMut(Range<usize>)) {
        debug_assert!(n <= self.len);
        if n == 1 {
            // The case of a decode step.
            let next = after.map(|id| id.index() + 1).filter(|&at| self.run_at(at) > 0);
            let start = next.unwrap_or_else(|| self.fresh_start());
            self.remove_word(start / WORD, 1 << (start % WORD), 1);
            add_run(start..start + 1);
            return;
        }
        let mut left = n;
        let mut next = after.map(|id| id.index() + 1);
        while left > 0 {
            // When a run is exhausted, the next one begins at a fresh start, which always has a free block.
            let start = next.filter(|&at| self.run_at(at) > 0).unwrap_or_else(|| self.fresh_start());
            let run = self.run_at(start).min(left);
            debug_assert!(run > 0);
            if run == 0 {
                return;
            }
            self.remove_word(start / WORD, low_bits(run) << (start % WORD), run);
            add_run(start..start + run);
            left -= run;
            next = Some(start + run);
        }
    }

    /// How many blocks are free from `at` on, counted up to the end of its word.
    #[inline]
    fn run_at(&self, at: usize) -> usize {
        let Some(word) = self.words.get(at / WORD) else {
            return 0;
        };
        (!(word >> (at % WORD))).trailing_zeros() as usize
    }

    #[inline]
    fn fresh_start(&self) -> usize {
        let word = first_set(&self.whole).or_else(|| first_set(&self.any)).unwrap_or(0);
        word * WORD + (self.words[word].trailing_zeros() as usize % WORD)
    }

    /// Whether the summaries and the length agree with the bits.
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

    fn allocate(free: &mut FreeBlocks, n: usize, after: Option<usize>) -> Vec<usize> {
        let mut out = Vec::new();
        free.allocate(n, after.map(BlockId::new), |run| out.extend(run));
        assert!(free.is_consistent());
        out
    }

    #[test]
    fn a_growing_sequence_continues_directly_after_its_last_block() {
        let mut free = FreeBlocks::all(256);
        assert_eq!(allocate(&mut free, 3, None), [0, 1, 2]);
        assert_eq!(allocate(&mut free, 2, Some(2)), [3, 4]);
    }

    #[test]
    fn each_sequence_starts_in_a_word_of_its_own() {
        let mut free = FreeBlocks::all(256);
        assert_eq!(allocate(&mut free, 2, None), [0, 1]);
        assert_eq!(allocate(&mut free, 2, None), [64, 65]);
        assert_eq!(allocate(&mut free, 1, Some(1)), [2]);
        assert_eq!(allocate(&mut free, 1, Some(65)), [66]);
    }

    #[test]
    fn a_run_crosses_words_and_a_full_pool_allocates_its_lowest_free_blocks() {
        let mut free = FreeBlocks::all(130);
        assert_eq!(allocate(&mut free, 70, None), (0..70).collect::<Vec<_>>());
        free.insert(BlockId::new(5));
        assert_eq!(allocate(&mut free, 2, Some(129)), [5, 70]);
        assert_eq!(allocate(&mut free, 59, None), (71..130).collect::<Vec<_>>());
        assert_eq!(free.len(), 0);
    }
}
