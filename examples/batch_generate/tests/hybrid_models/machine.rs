//! Runs sequences through one cache, and checks everything that it computes.

use paged_attention::{BlockTable, KvCache, KvCacheBuilder, KvDtype, OutOfWindow, PushError};
use test_support::Random;

use crate::decoder::VOCABULARY;
use crate::reference::Tested;

pub(crate) const BLOCK_SIZES: [usize; 3] = [1, 4, 16];

/// How many tokens are generated at least.
pub(crate) const ANSWER: usize = 40;

/// A prompt of random tokens. Scenarios share prompts, because the reference takes most of the time.
pub(crate) fn prompt(len: usize) -> Vec<u32> {
    let mut random = Random::new(len as u64);
    (0..len).map(|_| random.below(VOCABULARY) as u32).collect()
}

/// A token that is not this one.
pub(crate) fn other_than(token: u32) -> u32 {
    (token + 1) % VOCABULARY as u32
}

pub(crate) struct Machine<'m> {
    pub(crate) tested: &'m Tested,
    pub(crate) cache: KvCache,
}

/// A sequence. Those of its tokens that are not in the table are still to be computed.
pub(crate) struct Sequence {
    pub(crate) table: BlockTable,
    pub(crate) tokens: Vec<u32>,
    /// For each group of layers, how many blocks its window has passed: it never gets them back.
    passed: Vec<usize>,
}

/// What one step does for a sequence.
pub(crate) struct Work<'s> {
    pub(crate) sequence: &'s mut Sequence,
    /// How many tokens it computes.
    pub(crate) computed: usize,
    /// How many of those are committed.
    pub(crate) accepted: usize,
}

impl<'m> Machine<'m> {
    /// A machine with room for much more than the tests need, so that nothing is evicted.
    pub(crate) fn new(tested: &'m Tested, block_size: usize) -> Self {
        Self::of(tested, |cache| cache.block_size(block_size).blocks(1024 / block_size))
    }

    /// A machine with room for one sequence of `len` tokens that is computed in chunks, and half of another.
    pub(crate) fn small(tested: &'m Tested, block_size: usize, len: usize, chunk: usize) -> Self {
        let bytes = tested.groups.iter().map(|group| {
            let tokens = tested.window(group).map_or(len, |window| window + chunk);
            let blocks = tokens.div_ceil(block_size) + 1;
            blocks * group.shape().bytes_per_block(block_size, KvDtype::F32).unwrap()
        });
        Self::of(tested, |cache| cache.block_size(block_size).memory(bytes.sum::<usize>() * 3 / 2))
    }

    fn of(tested: &'m Tested, size: impl FnOnce(KvCacheBuilder) -> KvCacheBuilder) -> Self {
        let cache = size(KvCache::builder_of(tested.groups.clone())).build().unwrap();
        Self { tested, cache }
    }

    /// A new sequence, for which nothing is computed yet.
    pub(crate) fn start(&self, tokens: &[u32]) -> Sequence {
        Sequence { table: self.cache.table(), tokens: tokens.to_vec(), passed: vec![0; self.tested.groups.len()] }
    }

    /// The same, which starts with what is cached.
    pub(crate) fn start_cached(&self, tokens: &[u32]) -> Sequence {
        let mut sequence = self.start(tokens);
        let matched = sequence.table.match_prefix(tokens);
        assert_eq!(matched, sequence.table.len());
        self.check_blocks(&mut sequence);
        sequence
    }

    /// One step. A sequence whose tokens are all computed gets its next token. All logits are checked. Returns which
    /// sequences had no room.
    pub(crate) fn try_step(&self, work: &mut [Work<'_>]) -> Vec<usize> {
        let mut step = self.cache.step();
        let (mut pushed, mut accepted, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        for (i, work) in work.iter_mut().enumerate() {
            let start = work.sequence.table.len();
            let tokens = &work.sequence.tokens[start..start + work.computed];
            match step.push(&mut work.sequence.table, tokens) {
                Ok(()) => {
                    pushed.push((i, start));
                    accepted.push(work.accepted);
                }
                Err(PushError::OutOfBlocks(_)) => refused.push(i),
                Err(error) => panic!("{error}"),
            }
        }
        if pushed.is_empty() {
            return refused;
        }
        let logits = self.tested.decoder.forward_step(&step).unwrap().to_vec2::<f32>().unwrap();
        if accepted.iter().sum::<usize>() == step.tokens() {
            step.commit().unwrap();
        } else {
            step.commit_accepted(&accepted).unwrap();
        }
        let mut rows = logits.iter();
        for (i, start) in pushed {
            let Work { sequence, computed, accepted } = &mut work[i];
            for len in start + 1..=start + *computed {
                let next = self.tested.check(&sequence.tokens[..len], rows.next().unwrap());
                if len == sequence.tokens.len() {
                    sequence.tokens.push(next);
                    break;
                }
            }
            assert_eq!(sequence.table.len(), start + *accepted);
            self.check_blocks(sequence);
        }
        assert!(rows.next().is_none());
        refused
    }

    /// One step that has room for all.
    pub(crate) fn step(&self, work: &mut [Work<'_>]) {
        assert!(self.try_step(work).is_empty(), "the pool is too small");
    }

    /// Computes all tokens that are known, and then one token for each sequence and step, until all have `n` more.
    pub(crate) fn generate(&self, sequences: &mut [&mut Sequence], n: usize) {
        for _ in 0..n {
            let mut work: Vec<Work<'_>> = sequences.iter_mut().map(|sequence| sequence.rest()).collect();
            self.step(&mut work);
        }
    }

    /// A group has the blocks of all tokens that the next token sees, and no others.
    pub(crate) fn check_blocks(&self, sequence: &mut Sequence) {
        let block_size = self.cache.pool().block_size();
        let len = sequence.table.len();
        for (group, of) in self.tested.groups.iter().enumerate() {
            let window = self.tested.window(of);
            let first_seen = window.map_or(0, |window| (len + 1).saturating_sub(window));
            let passed = &mut sequence.passed[group];
            *passed = (*passed).max(first_seen / block_size);
            let blocks = sequence.table.blocks_of_group(group).len();
            assert_eq!(blocks, len.div_ceil(block_size) - *passed, "group {group}, {len} tokens");
            // The point of all this, whatever the length.
            if let Some(window) = window {
                assert!(blocks <= (window - 1).div_ceil(block_size) + 1, "{blocks} blocks for {window} tokens");
            }
        }
    }

    /// Whether all windows still have what the token after the first `len` tokens sees.
    pub(crate) fn can_truncate(&self, sequence: &Sequence, len: usize) -> bool {
        let block_size = self.cache.pool().block_size();
        self.tested.groups.iter().zip(&sequence.passed).all(|(group, passed)| {
            let window = self.tested.window(group);
            window.is_none_or(|window| len == 0 || (len + 1).saturating_sub(window) >= passed * block_size)
        })
    }

    /// Keeps the first `len` tokens, and takes the reference's next one.
    pub(crate) fn truncate(&self, sequence: &mut Sequence, len: usize) -> Result<(), OutOfWindow> {
        sequence.table.truncate(len)?;
        sequence.tokens.truncate(len);
        sequence.tokens.push(self.tested.next(&sequence.tokens));
        self.check_blocks(sequence);
        Ok(())
    }
}

impl Sequence {
    /// Work that computes `n` tokens.
    pub(crate) fn next(&mut self, n: usize) -> Work<'_> {
        Work { sequence: self, computed: n, accepted: n }
    }

    /// Work that computes all tokens that are known.
    pub(crate) fn rest(&mut self) -> Work<'_> {
        let n = self.tokens.len() - self.table.len();
        self.next(n)
    }

    /// A fork that continues with another token.
    pub(crate) fn fork_with(&self, token: u32) -> Self {
        let mut tokens = self.tokens[..self.table.len()].to_vec();
        tokens.push(token);
        Self { table: self.table.fork(), tokens, passed: self.passed.clone() }
    }
}
