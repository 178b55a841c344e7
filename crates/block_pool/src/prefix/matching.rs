//! The longest cached prefix of a sequence's tokens.

use smallvec::SmallVec;

use super::children::{Children, Near};
use super::{Entry, NodeKey, PrefixTree};
use crate::{BlockId, PrefixKey, SaltFrom, Span};

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
    /// block before, and `salts` are those of the sequence. Passes to `found`, group by group and in order, the blocks
    /// that a table of that length uses: all of them, or, with a window, those of the sink tokens and those that the next
    /// token sees.
    #[inline]
    pub(crate) fn longest(
        &self,
        key: &PrefixKey,
        at: usize,
        last: Option<Entry>,
        salts: &[SaltFrom],
        tokens: &[u32],
        mut found: impl FnMut(usize, BlockId),
    ) -> Match {
        let Some(start) = self.start(key, at, last) else { return Match::default() };
        if !salts.is_empty() {
            return self.longest_with_salts(key, start, at, salts, tokens, &mut found);
        }
        let children = |node: NodeKey, _| Some(&self.nodes[node as usize].children);
        if self.is_without_windows(key) {
            return self.longest_without_window(start, tokens, children, |id| found(0, id));
        }
        self.longest_with_windows(key, start, at, tokens, children, &mut found)
    }

    /// The same for a sequence with salts: where salts begin in a block, it is found only among the children in which
    /// the same begin.
    #[inline(never)]
    fn longest_with_salts(
        &self,
        key: &PrefixKey,
        start: NodeKey,
        at: usize,
        salts: &[SaltFrom],
        tokens: &[u32],
        found: &mut dyn FnMut(usize, BlockId),
    ) -> Match {
        let children = |node: NodeKey, tokens: usize| {
            let first = at * self.block_size + tokens;
            let salts = SaltFrom::at(salts, first..first + self.block_size);
            self.nodes[node as usize].children.with_salts(salts)
        };
        if self.is_without_windows(key) {
            return self.longest_without_window(start, tokens, children, |id| found(0, id));
        }
        self.longest_with_windows(key, start, at, tokens, children, found)
    }

    /// Whether there is one group, and sequences of this key see all tokens in it.
    #[inline]
    fn is_without_windows(&self, key: &PrefixKey) -> bool {
        self.stride == 1 && key.window.is_none() && self.groups[0].0.is_all()
    }

    /// Marks a match as used.
    pub(crate) fn record_use(&mut self, found: Match) {
        if found.tokens > 0 {
            self.touch(found.end);
        }
    }

    /// With one group and without a window, a prefix ends before the first block that is missing. `children` are those of
    /// a node, after so many tokens, that the sequence may continue with.
    #[inline]
    fn longest_without_window<'s>(
        &'s self,
        start: NodeKey,
        tokens: &[u32],
        children: impl Fn(NodeKey, usize) -> Option<&'s Children>,
        mut found: impl FnMut(BlockId),
    ) -> Match {
        let mut longest = Match { tokens: 0, end: start };
        // `found` is called in one place only, so that it is inlined into the loop.
        loop {
            let rest = &tokens[longest.tokens..];
            let Some(children) = children(longest.end, longest.tokens) else { return longest };
            let of = |child| self.tokens_of(child);
            let near = match rest.get(..self.block_size) {
                Some(block) => children.near(block, of),
                None => Near::Between(children.neighbours(rest, of)),
            };
            let part = match near {
                Near::Exact(child) => match self.block(child, 0) {
                    Some(id) => {
                        longest.end = child;
                        Some((id, self.block_size))
                    }
                    None => self.nearest_block(children.neighbours(rest, of), rest),
                },
                Near::Between(neighbours) => self.nearest_block(neighbours, rest),
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
    /// missing. The longest match is the last position at which the blocks that are needed in every group are cached.
    ///
    /// (vLLM looks for enough consecutive blocks before an end, group after group, until no group shortens the match
    /// any more. On one path from the root, one walk finds the same.)
    #[inline(never)]
    fn longest_with_windows<'s>(
        &'s self,
        key: &PrefixKey,
        start: NodeKey,
        at: usize,
        tokens: &[u32],
        children: impl Fn(NodeKey, usize) -> Option<&'s Children>,
        found: &mut dyn FnMut(usize, BlockId),
    ) -> Match {
        let block_size = self.block_size;
        let mut needs: SmallVec<[Needs; 2]> =
            self.groups.iter().map(|(span, _)| Needs::new(span.narrowed_by(key.window), block_size)).collect();
        // The nodes on the path from block `at` on, and how many of them the longest match so far has.
        let mut path = SmallVec::<[NodeKey; 64]>::new();
        let (mut node, mut whole, mut part) = (start, at, None);
        'walk: for block in tokens.chunks_exact(block_size) {
            let of_node = children(node, path.len() * block_size);
            let child = of_node.and_then(|children| children.get(block, |child| self.tokens_of(child)));
            let Some(child) = child else { break };
            let blocks = at + path.len();
            for (group, needs) in needs.iter_mut().enumerate() {
                if self.block(child, group).is_none() {
                    if needs.span.is_all() || blocks < needs.sink_blocks {
                        break 'walk;
                    }
                    needs.cached_from = blocks + 1;
                }
            }
            node = child;
            path.push(child);
            if needs.iter().all(|needs| needs.are_met(blocks + 1, 0)) {
                whole = blocks + 1;
            }
        }
        let end = at + path.len();
        let matched = path.len() * block_size;
        let nearest = children(node, matched).and_then(|children| self.nearest_child(children, &tokens[matched..]));
        if let Some((child, n)) = nearest.filter(|&(_, n)| needs.iter().all(|needs| needs.are_met(end, n))) {
            (whole, part) = (end, Some((child, n)));
        }
        let tokens = (whole - at) * block_size + part.map_or(0, |(_, n)| n);
        for (group, needs) in needs.iter().enumerate() {
            let seen = needs.first_seen(at * block_size + tokens);
            let blocks = (at..whole).filter(|&block| block < needs.sink_blocks || block >= seen);
            let nodes = blocks.map(|block| path[block - at]).chain(part.map(|(child, _)| child));
            nodes.filter_map(|node| self.block(node, group)).for_each(|id| found(group, id));
        }
        Match { tokens, end: if whole == at { start } else { path[whole - at - 1] } }
    }

    /// The child that shares the most tokens with `tokens`, out of those that have a block in every group; and how many
    /// they share, at least one.
    fn nearest_child(&self, children: &Children, tokens: &[u32]) -> Option<(NodeKey, usize)> {
        let neighbours = children.neighbours(tokens, |child| self.tokens_of(child));
        self.nearest_of(neighbours, tokens, |child| self.blocks(child).count() == self.stride)
    }

    /// The block of the neighbour that shares the most tokens with `tokens`, and how many they share, at least one.
    fn nearest_block(&self, neighbours: [Option<NodeKey>; 2], tokens: &[u32]) -> Option<(BlockId, usize)> {
        let (child, n) = self.nearest_of(neighbours, tokens, |child| self.has_block(child))?;
        Some((self.block(child, 0)?, n))
    }

    fn nearest_of(
        &self,
        neighbours: [Option<NodeKey>; 2],
        tokens: &[u32],
        is_cached: impl Fn(NodeKey) -> bool,
    ) -> Option<(NodeKey, usize)> {
        neighbours
            .into_iter()
            .flatten()
            .filter(|&child| is_cached(child))
            .map(|child| (child, common(self.tokens_of(child), tokens)))
            .max_by_key(|&(_, matching)| matching)
            .filter(|&(_, matching)| matching > 0)
    }
}

/// What a match needs of one group.
struct Needs {
    span: Span,
    block_size: usize,
    sink_blocks: usize,
    /// All blocks of the path from this number on are cached, and so are the sink blocks.
    cached_from: usize,
}

impl Needs {
    fn new(span: Span, block_size: usize) -> Self {
        Self { span, block_size, sink_blocks: span.sink_blocks(block_size), cached_from: 0 }
    }

    /// The first block, apart from sink blocks, that the next token of a sequence of `len` tokens sees.
    fn first_seen(&self, len: usize) -> usize {
        self.sink_blocks + self.span.freed_blocks(len, self.block_size)
    }

    /// Whether all blocks that the token after `blocks` blocks and `more` tokens sees are cached, as far as they are
    /// among these blocks.
    fn are_met(&self, blocks: usize, more: usize) -> bool {
        self.cached_from <= self.first_seen(blocks * self.block_size + more)
    }
}

/// How many tokens two sequences share at their start.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
