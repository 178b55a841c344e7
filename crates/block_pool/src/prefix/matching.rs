//! The longest cached prefix of a sequence's tokens.

use smallvec::SmallVec;

use super::children::Near;
use super::{NodeKey, PrefixTree};
use crate::{BlockId, PrefixKey, Window};

/// The result of a search for a prefix.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Match {
    /// How many tokens match. They may end inside the last block.
    pub(crate) tokens: usize,
    /// The node of the last full block that matches, or the one at which the search began.
    end: NodeKey,
}

impl PrefixTree {
    /// Finds the longest cached prefix of `tokens`, a sequence's tokens from its block number `at` on; `last` is the
    /// block before. Passes to `found`, in order, the blocks that a table of that length uses: all of them, or, with a
    /// window, those of the sink tokens and those that the next token sees.
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
            None => self.longest_without_window(start, tokens, found),
            Some(window) => self.longest_with_window(window, start, at, tokens, &mut found),
        }
    }

    /// Marks a match as used.
    pub(crate) fn record_use(&mut self, found: Match) {
        if found.tokens > 0 {
            self.touch(found.end);
        }
    }

    /// Without a window, a prefix ends before the first block that is missing.
    #[inline]
    fn longest_without_window(&self, start: NodeKey, tokens: &[u32], mut found: impl FnMut(BlockId)) -> Match {
        let mut longest = Match { tokens: 0, end: start };
        // `found` is called in one place only, so that it is inlined into the loop.
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

    /// With a window, only the blocks of the sink tokens and those that the next token sees are needed; others may be
    /// missing. The longest match is the last position at which the needed blocks are cached. (vLLM does the same from
    /// the right: it looks for enough consecutive blocks before an end.)
    #[inline(never)]
    fn longest_with_window(
        &self,
        window: Window,
        start: NodeKey,
        at: usize,
        tokens: &[u32],
        found: &mut dyn FnMut(BlockId),
    ) -> Match {
        let (block_size, sink_blocks) = (self.block_size, window.sink_blocks(self.block_size));
        let mut ids = SmallVec::<[BlockId; 64]>::new();
        let first_seen = |len: usize| sink_blocks + window.freed_blocks(len, block_size);
        // The node reached, and how many blocks lead to it. All of them from number `cached_from` on, and the sink
        // blocks, are cached.
        let (mut node, mut blocks, mut cached_from) = (start, at, 0);
        // The last end so far at which all needed blocks are cached.
        let (mut end, mut whole, mut part) = (start, at, None);
        for block in tokens.chunks_exact(block_size) {
            let Some((child, id)) = self.child(node, block) else { break };
            match id {
                None if blocks < sink_blocks => break,
                None => cached_from = blocks + 1,
                Some(id) if blocks < sink_blocks => ids.push(id),
                Some(_) => {}
            }
            (node, blocks) = (child, blocks + 1);
            if cached_from <= first_seen(blocks * block_size) {
                (end, whole) = (node, blocks);
            }
        }
        if let Some((id, n)) = self.nearest_child(node, &tokens[(blocks - at) * block_size..])
            && cached_from <= first_seen(blocks * block_size + n)
        {
            (end, whole, part) = (node, blocks, Some((id, n)));
        }
        let tokens = (whole - at) * block_size + part.map_or(0, |(_, n)| n);
        let sink_end = sink_blocks.clamp(at, whole);
        ids.truncate(sink_end - at);
        let seen = first_seen(at * block_size + tokens).clamp(sink_end, whole);
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

    /// The child with exactly these tokens, which are one block, and its block if it has one.
    #[inline(always)]
    fn child(&self, parent: NodeKey, tokens: &[u32]) -> Option<(NodeKey, Option<BlockId>)> {
        let key = self.nodes[parent as usize].children.get(tokens, |child| self.tokens_of(child))?;
        Some((key, self.block(key)))
    }

    /// The block after `parent` that shares the most tokens with `tokens`, and how many they share: at least one.
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
