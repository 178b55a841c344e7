//! The longest cached prefix of some tokens.

use smallvec::SmallVec;

use super::children::Near;
use super::{NodeKey, PrefixTree};
use crate::{BlockId, PrefixKey, Window};

/// What of a sequence's tokens is cached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Match {
    /// How many tokens. They may end inside the last block.
    pub(crate) tokens: usize,
    /// The node of the last whole block, or that after which was sought.
    end: NodeKey,
}

impl PrefixTree {
    /// Finds the longest cached prefix of `tokens`, a sequence's tokens from its block number `at` on, where `last` is the
    /// block before. Hands the blocks to `found` that a table of that length holds, in order: all of them, or, through a
    /// window, those of the sinks and those that the next token sees.
    #[inline]
    pub(crate) fn longest(
        &self,
        key: &PrefixKey,
        at: usize,
        last: Option<BlockId>,
        tokens: &[u32],
        mut found: impl FnMut(BlockId),
    ) -> Match {
        let Some(start) = self.start(key, at, last) else { return Match::default() };
        match key.window {
            None => self.longest_of_all(start, tokens, found),
            Some(window) => self.longest_through(window, start, at, tokens, &mut found),
        }
    }

    /// Notes that a match was used.
    pub(crate) fn count_use(&mut self, found: Match) {
        if found.tokens > 0 {
            self.touch(found.end);
        }
    }

    /// Without a window the blocks before a missing one are what there is.
    #[inline]
    fn longest_of_all(&self, start: NodeKey, tokens: &[u32], mut found: impl FnMut(BlockId)) -> Match {
        let mut longest = Match { tokens: 0, end: start };
        // Blocks are handed on in one place, so that what becomes of them is compiled into the loop.
        loop {
            let rest = &tokens[longest.tokens..];
            let children = &self.nodes[longest.end as usize].children;
            let of = |child| self.tokens_of(child);
            let near = match rest.get(..self.block_size) {
                Some(block) => children.near(block, of),
                None => Near::Between(children.neighbours(rest, of)),
            };
            let part = match near {
                Near::Exact(child) => match self.block(child) {
                    Some(id) => {
                        longest.end = child;
                        Some((id, self.block_size))
                    }
                    None => self.nearest_of(children.neighbours(rest, of), rest),
                },
                Near::Between(neighbours) => self.nearest_of(neighbours, rest),
            };
            let Some((id, part)) = part else { return longest };
            found(id);
            longest.tokens += part;
            if part < self.block_size {
                return longest;
            }
        }
    }

    /// Through a window the sinks and the blocks that the next token sees are needed, whatever is missing between them: the
    /// end is the last one before which these are there (as vLLM looks for the neighbours before an end, from the right).
    #[inline(never)]
    fn longest_through(
        &self,
        window: Window,
        start: NodeKey,
        at: usize,
        tokens: &[u32],
        found: &mut dyn FnMut(BlockId),
    ) -> Match {
        let (block_size, sinks) = (self.block_size, window.sink_blocks(self.block_size));
        let mut ids = SmallVec::<[BlockId; 64]>::new();
        let first_seen = |len: usize| sinks + window.passed_blocks(len, block_size);
        // The node reached and how many blocks lead there; all from number `there` on have a block, as have the sinks.
        let (mut node, mut blocks, mut there) = (start, at, 0);
        // The last end so far that has what is needed.
        let (mut end, mut whole, mut part) = (start, at, None);
        for block in tokens.chunks_exact(block_size) {
            let Some((child, id)) = self.child(node, block) else { break };
            match id {
                None if blocks < sinks => break,
                None => there = blocks + 1,
                Some(id) if blocks < sinks => ids.push(id),
                Some(_) => {}
            }
            (node, blocks) = (child, blocks + 1);
            if there <= first_seen(blocks * block_size) {
                (end, whole) = (node, blocks);
            }
        }
        if let Some((id, n)) = self.nearest_child(node, &tokens[(blocks - at) * block_size..])
            && there <= first_seen(blocks * block_size + n)
        {
            (end, whole, part) = (node, blocks, Some((id, n)));
        }
        let tokens = (whole - at) * block_size + part.map_or(0, |(_, n)| n);
        let sinks = sinks.clamp(at, whole);
        ids.truncate(sinks - at);
        let seen = first_seen(at * block_size + tokens).clamp(sinks, whole);
        let first = ids.len();
        let mut node = end;
        for _ in seen..whole {
            ids.extend(self.block(node));
            node = self.nodes[node as usize].parent;
        }
        ids[first..].reverse();
        ids.extend(part.map(|(id, _)| id));
        ids.into_iter().for_each(found);
        Match { tokens, end }
    }

    /// The child with exactly these tokens, one block of them, and its block if it has one.
    #[inline(always)]
    fn child(&self, parent: NodeKey, tokens: &[u32]) -> Option<(NodeKey, Option<BlockId>)> {
        let key = self.nodes[parent as usize].children.get(tokens, |child| self.tokens_of(child))?;
        Some((key, self.block(key)))
    }

    /// The block after `parent` that shares the most tokens with `tokens`, and how many: at least one.
    fn nearest_child(&self, parent: NodeKey, tokens: &[u32]) -> Option<(BlockId, usize)> {
        let neighbours = self.nodes[parent as usize].children.neighbours(tokens, |child| self.tokens_of(child));
        self.nearest_of(neighbours, tokens)
    }

    fn nearest_of(&self, neighbours: [Option<NodeKey>; 2], tokens: &[u32]) -> Option<(BlockId, usize)> {
        neighbours
            .into_iter()
            .flatten()
            .filter_map(|key| Some((self.block(key)?, common(self.tokens_of(key), tokens))))
            .max_by_key(|&(_, matching)| matching)
            .filter(|&(_, matching)| matching > 0)
    }
}

/// How many tokens two sequences share at their start.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
