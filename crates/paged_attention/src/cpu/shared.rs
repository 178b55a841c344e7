//! Which sequences of a step read the same blocks.
//!
//! A system prompt, a document or the prompt of several samples is stored once, and each of its sequences reads it. The
//! rows of such sequences can be computed together, so that every key and value is loaded once for all of them
//! ("ChunkAttention", Ye et al. 2024, section 3). The block ids say which they are: equal ids at equal positions are
//! the same tokens, whoever shares them and for whatever reason. A row's result does not depend on the rows that are
//! computed with it, so it is the same as without.

use std::ops::Range;

use super::algorithm::CHUNK;
use crate::plan::{Plan, Planned};

/// Sequences with more new tokens are bound by arithmetic, and share nothing with others.
const MOST_NEW_TOKENS: usize = 32;

/// The sequences of a plan that read the same blocks.
#[derive(Debug)]
pub(crate) struct Shared {
    /// What is shared for fewer tokens is left out.
    pub(crate) fewest_tokens: usize,
    pub(super) runs: Vec<Run>,
}

/// Two or more sequences that have all blocks of some consecutive chunks in common.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) chunks: Range<usize>,
    /// Their indices in the plan, in ascending order.
    pub(super) sequences: Vec<usize>,
}

impl Shared {
    /// Compares the block ids of the sequences of a plan. What is shared for fewer than `fewest_tokens` is left out.
    pub(crate) fn of(plan: &Plan, block_size: usize, fewest_tokens: usize) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        let few = |&sequence: &usize| plan.sequences[sequence].rows.len() <= MOST_NEW_TOKENS;
        let mut sequences: Vec<usize> = (0..plan.sequences.len()).filter(few).collect();
        let mut last_run = vec![None; plan.sequences.len()];
        for chunk in 0.. {
            // The last tokens of a sequence are its own: only full chunks can be shared.
            sequences.retain(|&sequence| plan.sequences[sequence].len() / CHUNK > chunk);
            if sequences.len() < 2 {
                break;
            }
            let blocks = |sequence: usize| Blocks::of(&plan.sequences[sequence], &plan.blocks, chunk, block_size);
            for part in alike(&sequences, blocks) {
                let last = last_run[part[0]].filter(|_| part.iter().all(|&of| last_run[of] == last_run[part[0]]));
                let mut start = chunk;
                if let Some(run) = last.map(|run: usize| &mut runs[run]).filter(|run| run.chunks.end == chunk) {
                    if run.sequences.len() == part.len() {
                        run.chunks.end += 1;
                        continue;
                    }
                    // What is too short by itself is the beginning of what some of its sequences share.
                    if run.chunks.len() * CHUNK < fewest_tokens {
                        start = run.chunks.start;
                    }
                }
                part.iter().for_each(|&sequence| last_run[sequence] = Some(runs.len()));
                runs.push(Run { chunks: start..chunk + 1, sequences: part });
            }
        }
        runs.retain(|run| run.chunks.len() * CHUNK >= fewest_tokens);
        Self { fewest_tokens, runs }
    }

    /// How many tokens of sequences are read with those of another one.
    pub(crate) fn tokens(&self, plan: &Plan, block_size: usize) -> usize {
        let tokens = |run: &Run| -> usize {
            let chunks = run.chunks.clone().map(|chunk| {
                let within = |at: usize| at.clamp(chunk * CHUNK, (chunk + 1) * CHUNK);
                let blocks = Blocks::of(&plan.sequences[run.sequences[0]], &plan.blocks, chunk, block_size);
                let tokens = blocks.map(|(block, _)| within((block + 1) * block_size) - within(block * block_size));
                tokens.sum::<usize>()
            });
            chunks.sum()
        };
        self.runs.iter().map(|run| (run.sequences.len() - 1) * tokens(run)).sum()
    }
}

/// Those of the sequences that have the same blocks as others, in parts of two or more.
fn alike<'a>(sequences: &[usize], blocks: impl Fn(usize) -> Blocks<'a>) -> Vec<Vec<usize>> {
    // Where nothing is shared, comparing the first blocks is all there is to do.
    let first = sequences.iter().filter_map(|&sequence| Some((blocks(sequence).next()?, sequence)));
    let mut first: Vec<_> = first.collect();
    first.sort_unstable();
    let mut parts = Vec::new();
    for first in first.chunk_by(|a, b| a.0 == b.0).filter(|first| first.len() > 1) {
        let mut left: Vec<usize> = first.iter().map(|&(_, sequence)| sequence).collect();
        while left.len() > 1 {
            let (part, others) = left.iter().partition(|&&sequence| blocks(sequence).eq(blocks(left[0])));
            parts.push(part);
            left = others;
        }
    }
    parts.retain(|part| part.len() > 1);
    parts
}

/// The blocks of a sequence that are in a chunk and were not freed: their logical indices and their ids, in order.
#[derive(Clone)]
struct Blocks<'a> {
    planned: &'a Planned,
    ids: &'a [u32],
    blocks: Range<usize>,
}

impl<'a> Blocks<'a> {
    fn of(planned: &'a Planned, ids: &'a [u32], chunk: usize, block_size: usize) -> Self {
        let blocks = chunk * CHUNK / block_size..((chunk + 1) * CHUNK).div_ceil(block_size);
        Self { planned, ids: &ids[planned.blocks.clone()], blocks }
    }
}

impl Iterator for Blocks<'_> {
    type Item = (usize, u32);

    fn next(&mut self) -> Option<(usize, u32)> {
        self.blocks.find_map(|block| Some((block, *self.ids.get(self.planned.index_of(block)?)?)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A plan of one new token for each of these sequences: their numbers of tokens and their blocks.
    fn plan(sequences: &[(usize, Vec<u32>)]) -> Plan {
        let mut plan = Plan::default();
        sequences.iter().for_each(|(tokens, ids)| plan.push_last(1, *tokens, ids.iter().copied()));
        plan
    }

    /// The chunks and sequences of each run.
    fn runs(
        sequences: &[(usize, Vec<u32>)],
        block_size: usize,
        fewest_tokens: usize,
    ) -> Vec<(Range<usize>, Vec<usize>)> {
        let shared = Shared::of(&plan(sequences), block_size, fewest_tokens);
        shared.runs.into_iter().map(|run| (run.chunks, run.sequences)).collect()
    }

    #[test]
    fn sequences_share_what_their_blocks_share() {
        // Blocks of 64 tokens, eight to a chunk.
        let a: Vec<u32> = (0..40).collect();
        let like_a = |blocks: usize, id: u32| [&a[..blocks], &(id..id + 40).collect::<Vec<_>>()[blocks..]].concat();
        // Of five chunks, the second and the third share the first two with others, and two more with each other.
        let sequences = [(2560, a.clone()), (2560, like_a(20, 100)), (2560, like_a(33, 200)), (2560, like_a(0, 300))];
        let of_three = (0..2, vec![0, 1, 2]);
        assert_eq!(runs(&sequences, 64, 0), [of_three.clone(), (2..4, vec![0, 2])]);
        assert_eq!(runs(&sequences, 64, 1024), [of_three, (2..4, vec![0, 2])]);
        // What is too short for three is part of what two of them share.
        assert_eq!(runs(&sequences, 64, 1025), [(0..4, vec![0, 2])]);
        assert_eq!(runs(&sequences, 64, 2049), []);
        let tokens = |fewest_tokens| {
            let plan = plan(&sequences);
            Shared::of(&plan, 64, fewest_tokens).tokens(&plan, 64)
        };
        assert_eq!([0, 1025, 2049].map(tokens), [2 * 1024 + 1024, 2048, 0]);
        // Only full chunks.
        assert_eq!(runs(&[(1024, a.clone()), (1023, a.clone())], 64, 0), [(0..1, vec![0, 1])]);
        assert_eq!(runs(&[(511, a.clone()), (511, a.clone())], 64, 0), []);
        // Many new tokens are bound by arithmetic.
        let mut many = plan(&[(1024, a.clone())]);
        many.push_last(MOST_NEW_TOKENS + 1, 1024, a);
        assert_eq!(Shared::of(&many, 64, 0).runs, []);
    }

    #[test]
    fn random_trees_give_what_comparing_all_pairs_gives() {
        let mut state = 7u64;
        let mut below = |n: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % n
        };
        let mut found = 0;
        for round in 0..300 {
            let block_size = [1, 7, 16, 48, 64, 600][round % 6];
            let mut sequences: Vec<(usize, Vec<u32>)> = Vec::new();
            let mut fresh = 0;
            for _ in 0..2 + below(7) {
                let tokens = 1 + below(3000);
                // It begins like another one, up to a random block.
                let mut ids = match sequences.is_empty() {
                    true => Vec::new(),
                    false => sequences[below(sequences.len())].1.clone(),
                };
                ids.truncate([below(ids.len() + 1), ids.len()][below(2)]);
                ids.resize_with(tokens.div_ceil(block_size), || {
                    fresh += 1;
                    fresh
                });
                sequences.push((tokens, ids));
            }
            let ids = |sequence: usize, chunk: usize| {
                let (tokens, ids) = &sequences[sequence];
                let (start, end) = (chunk * CHUNK, (chunk + 1) * CHUNK);
                (end <= *tokens).then(|| &ids[start / block_size..end.div_ceil(block_size)])
            };
            // For each chunk, which sequences have it in common.
            let mut expected = BTreeSet::new();
            for chunk in 0..6 {
                for a in 0..sequences.len() {
                    let is_alike = |&b: &usize| ids(a, chunk).is_some() && ids(a, chunk) == ids(b, chunk);
                    let alike: Vec<usize> = (0..sequences.len()).filter(is_alike).collect();
                    if alike.len() > 1 {
                        expected.insert((chunk, alike));
                    }
                }
            }
            let all = runs(&sequences, block_size, 0);
            let by_chunk = all.iter().flat_map(|(chunks, of)| chunks.clone().map(move |chunk| (chunk, of.clone())));
            let by_chunk: Vec<_> = by_chunk.collect();
            assert_eq!(by_chunk.len(), expected.len(), "each once");
            assert_eq!(by_chunk.into_iter().collect::<BTreeSet<_>>(), expected);
            // Runs are as long as they can be.
            let continues = |a: &Range<usize>, b: &Range<usize>| a.end == b.start;
            assert!(all.iter().all(|a| all.iter().all(|b| a.1 != b.1 || !continues(&a.0, &b.0))), "{all:?}");
            // Of those that are long enough none is lost, and those that are too short only go into others.
            let long = runs(&sequences, block_size, 2 * CHUNK);
            let is_long = |run: &&(Range<usize>, Vec<usize>)| run.0.len() >= 2;
            for (chunks, of) in all.iter().filter(is_long) {
                let of_long = |run: &(Range<usize>, Vec<usize>)| run.1 == *of && run.0.end == chunks.end;
                assert!(long.iter().any(|run| of_long(run) && run.0.start <= chunks.start), "{all:?}: {long:?}");
            }
            for run in &long {
                found += 1;
                assert!(run.0.len() >= 2);
                let in_common = |chunk: usize| run.1.iter().all(|&b| ids(b, chunk) == ids(run.1[0], chunk));
                assert!(run.0.clone().all(in_common), "{sequences:?}: {long:?}");
            }
            // No sequence reads a chunk with two runs.
            let read =
                long.iter().flat_map(|(chunks, of)| of.iter().flat_map(|of| chunks.clone().map(move |at| (at, *of))));
            let read: Vec<_> = read.collect();
            assert_eq!(read.iter().collect::<BTreeSet<_>>().len(), read.len(), "{long:?}");
        }
        assert!(found > 100, "{found}");
    }
}
