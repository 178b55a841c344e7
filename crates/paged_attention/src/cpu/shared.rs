//! Which sequences of a step read the same blocks.
//!
//! A system prompt, a document or the prompt of several samples is stored once, and each of its sequences reads it. The
//! rows of such sequences can be computed together, so that every key and value is loaded once for all of them
//! ("ChunkAttention", Ye et al. 2024, section 3). The block ids say which they are: equal ids at equal positions are
//! the same tokens, whoever shares them and for whatever reason. A row's result does not depend on the rows that are
//! computed with it, so it is the same as without.

use std::ops::Range;

use super::algorithm::CHUNK;
use super::panels::TILE;
use crate::plan::{Plan, Planned};

/// Sequences with more new tokens are bound by arithmetic, and share nothing with others.
const MOST_NEW_TOKENS: usize = 32;

/// The sequences of a plan that read the same blocks, for each chunk of their tokens.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    sets: Vec<Set>,
    members: Vec<Member>,
}

/// Two or more sequences whose blocks at the beginning of a chunk are the same.
#[derive(Debug)]
pub(super) struct Set {
    pub(super) chunk: usize,
    /// In [`Shared::members`].
    members: Range<usize>,
}

/// A sequence of a set. Members are in the order of their block ids, so that neighbours have most in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Member {
    /// The index of the sequence in the plan.
    pub(super) sequence: usize,
    /// How many tokens of the chunk are the same as those of the member before: whole tiles, or [`CHUNK`] if all are.
    pub(super) common: usize,
}

impl Shared {
    /// Compares the block ids of the sequences of a plan.
    pub(crate) fn of(plan: &Plan, block_size: usize) -> Self {
        let mut shared = Self::default();
        let few = |&sequence: &usize| plan.sequences[sequence].rows.len() <= MOST_NEW_TOKENS;
        let sequences: Vec<usize> = (0..plan.sequences.len()).filter(few).collect();
        if sequences.len() < 2 {
            return shared;
        }
        let chunks_of = |sequence: usize| plan.sequences[sequence].len().div_ceil(CHUNK);
        let most = sequences.iter().map(|&sequence| chunks_of(sequence)).max().unwrap_or(0);
        let mut first = Vec::new();
        for chunk in 0..most {
            // Where nothing is shared, comparing the first blocks is all there is to do.
            let here = sequences.iter().copied().filter(|&sequence| chunk < chunks_of(sequence));
            first.clear();
            first.extend(here.filter_map(|sequence| {
                let mut blocks = Blocks::of(plan, sequence, chunk, block_size);
                blocks.next().map(|first| (first, sequence))
            }));
            first.sort_unstable();
            for alike in first.chunk_by(|a, b| a.0 == b.0).filter(|alike| alike.len() > 1) {
                shared.add(plan, chunk, block_size, alike.iter().map(|&(_, sequence)| sequence).collect());
            }
        }
        // What the same sequences read lies side by side, and a set comes after the larger ones of earlier chunks.
        let first = |set: &Set| shared.members[set.members.clone()].iter().map(|member| member.sequence).min();
        shared.sets.sort_by_cached_key(|set| (first(set), set.chunk));
        shared
    }

    /// Adds the sets of these sequences, whose first blocks in a chunk are the same.
    fn add(&mut self, plan: &Plan, chunk: usize, block_size: usize, mut sequences: Vec<usize>) {
        let blocks = |&sequence: &usize| Blocks::of(plan, sequence, chunk, block_size);
        let len = |sequence: usize| plan.sequences[sequence].len().min((chunk + 1) * CHUNK);
        sequences.sort_by(|a, b| blocks(a).cmp(blocks(b)).then((len(*a), a).cmp(&(len(*b), b))));
        let mut start = self.members.len();
        let mut before: Option<usize> = None;
        for sequence in sequences {
            let common = before.map_or(0, |before| {
                let equal = blocks(&before).zip(blocks(&sequence)).take_while(|(a, b)| a == b);
                let end = equal.last().map_or(0, |((block, _), _)| (block + 1) * block_size);
                let end = end.min(len(before)).min(len(sequence));
                let all = end >= (chunk + 1) * CHUNK || end == len(before) && end == len(sequence);
                if all { CHUNK } else { end.saturating_sub(chunk * CHUNK) / TILE * TILE }
            });
            if common == 0 {
                self.end_set(chunk, start);
                start = self.members.len();
            }
            self.members.push(Member { sequence, common });
            before = Some(sequence);
        }
        self.end_set(chunk, start);
    }

    /// Makes the members from `start` on a set, if they are several.
    fn end_set(&mut self, chunk: usize, start: usize) {
        match self.members.len() - start {
            0 => {}
            1 => self.members.truncate(start),
            _ => self.sets.push(Set { chunk, members: start..self.members.len() }),
        }
    }

    /// How many tokens of sequences are read with those of another one.
    pub(crate) fn tokens(&self, plan: &Plan) -> usize {
        let rest = |chunk: usize, member: &Member| plan.sequences[member.sequence].len() - chunk * CHUNK;
        let of = |(set, members): (&Set, &[Member])| -> usize {
            members.iter().map(|member| member.common.min(rest(set.chunk, member))).sum()
        };
        self.sets().map(of).sum()
    }

    /// The sets, and their members.
    pub(super) fn sets(&self) -> impl Iterator<Item = (&Set, &[Member])> {
        self.sets.iter().map(|set| (set, &self.members[set.members.clone()]))
    }
}

/// The blocks of a sequence that are in a chunk and were not freed: their logical indices and their ids, in order.
#[derive(Clone)]
struct Blocks<'a> {
    planned: &'a Planned,
    ids: &'a [u32],
    blocks: Range<usize>,
}

impl<'a> Blocks<'a> {
    fn of(plan: &'a Plan, sequence: usize, chunk: usize, block_size: usize) -> Self {
        let planned = &plan.sequences[sequence];
        let end = planned.len().min((chunk + 1) * CHUNK);
        let blocks = chunk * CHUNK / block_size..end.div_ceil(block_size);
        Self { planned, ids: &plan.blocks[planned.blocks.clone()], blocks }
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

    /// For each set its chunk, and its members with what they have in common with the one before.
    fn sets(sequences: &[(usize, Vec<u32>)], block_size: usize) -> Vec<(usize, Vec<(usize, usize)>)> {
        let shared = Shared::of(&plan(sequences), block_size);
        let members = |members: &[Member]| members.iter().map(|member| (member.sequence, member.common)).collect();
        shared.sets().map(|(set, of)| (set.chunk, members(of))).collect()
    }

    #[test]
    fn sequences_share_what_their_blocks_share() {
        // Blocks of 64 tokens, eight to a chunk: the second and the fourth differ in the second chunk.
        let a: Vec<u32> = (0..20).collect();
        let b = [&a[..11], &[91, 92]].concat();
        let c: Vec<u32> = (40..60).collect();
        let sequences = [(1280, a.clone()), (1280, c), (800, b)];
        assert_eq!(sets(&sequences, 64), [(0, vec![(0, 0), (2, CHUNK)]), (1, vec![(0, 0), (2, 3 * TILE)])]);
        // The same blocks up to the same end: all of the last chunk. To another end: only whole tiles.
        assert_eq!(sets(&[(100, a.clone()), (100, a.clone())], 64), [(0, vec![(0, 0), (1, CHUNK)])]);
        assert_eq!(sets(&[(130, a.clone()), (100, a.clone())], 64), [(0, vec![(1, 0), (0, TILE)])]);
        assert_eq!(sets(&[(130, a.clone()), (60, a.clone())], 64), []);
        // Many new tokens are bound by arithmetic.
        let mut many = plan(&[(100, a.clone())]);
        many.push_last(MOST_NEW_TOKENS + 1, 100, a);
        assert_eq!(Shared::of(&many, 64).sets().count(), 0);
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
                let tokens = 1 + below(1500);
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
            let tile = |sequence: usize, start: usize| {
                let (tokens, ids) = &sequences[sequence];
                let end = *tokens.min(&(start + TILE));
                (start < end).then(|| (end, ids[start / block_size..end.div_ceil(block_size)].to_vec()))
            };
            let in_common = |a: usize, b: usize, chunk: usize| {
                let starts = (chunk * CHUNK..(chunk + 1) * CHUNK).step_by(TILE);
                starts.take_while(|&start| tile(a, start).is_some() && tile(a, start) == tile(b, start)).count() * TILE
            };
            let chunks = sequences.iter().map(|(tokens, _)| tokens.div_ceil(CHUNK)).max().unwrap_or(0);
            let mut expected = BTreeSet::new();
            for chunk in 0..chunks {
                for a in 0..sequences.len() {
                    let alike: BTreeSet<usize> = (0..sequences.len()).filter(|&b| in_common(a, b, chunk) > 0).collect();
                    if alike.len() > 1 {
                        expected.insert((chunk, alike));
                    }
                }
            }
            let got = sets(&sequences, block_size);
            let of = |members: &[(usize, usize)]| members.iter().map(|member| member.0).collect::<BTreeSet<_>>();
            assert_eq!(got.iter().map(|(chunk, members)| (*chunk, of(members))).collect::<BTreeSet<_>>(), expected);
            for (chunk, members) in got {
                found += 1;
                assert_eq!(members[0].1, 0);
                for pair in members.windows(2) {
                    let rest = |(sequence, _): (usize, usize)| sequences[sequence].0.saturating_sub(chunk * CHUNK);
                    let common = in_common(pair[0].0, pair[1].0, chunk);
                    // All, if both end with the same tokens.
                    let all = common >= rest(pair[0]).max(rest(pair[1])).min(CHUNK);
                    assert_eq!(pair[1].1, if all { CHUNK } else { common }, "{sequences:?}, chunk {chunk}");
                }
            }
        }
        assert!(found > 300, "{found}");
    }
}
