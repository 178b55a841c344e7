//! Which blocks can be found by their tokens: a radix tree whose edges are blocks of tokens.
//!
//! The path from a root to a node spells the tokens of a prefix, and there is one root for each [`PrefixKey`]. A node has a
//! block while the keys and values of its tokens are in the pool. It can lose the block and keep its place and its tokens (a
//! *tombstone*), because what follows it may still be found: through a window, only the last blocks of a prefix are needed.
//!
//! What a node's block is, is for the block to say: the node names it, and it counts if the block names the node. So evicting
//! a block that others follow is one write in a dense array, and reads no node.
//!
//! Tokens are always compared; there are no hashes but the one that finds a key's root, and that map compares keys.

mod children;
mod leaves;
mod matching;
mod past;

use std::collections::HashMap;

use slab::Slab;

use crate::{BlockId, PrefixKey};
use children::Children;
use leaves::Links;

pub(crate) use matching::Match;
pub(crate) use past::Past;

/// A node's key in the slab. The root of [`PrefixKey::new`] is always there and has key 0, so that 0 can stand for "no
/// node" wherever only a block's node is meant.
pub(crate) type NodeKey = u32;

const ROOT: NodeKey = 0;
/// In [`PrefixTree::node_of`], beside a node: another one follows it.
const FOLLOWED: u32 = 1 << 31;

/// Tombstones for each block of the pool, at most. They cost some hundred bytes each; without a bound, an endless sequence
/// with a window would leave one for each block of tokens that it has passed.
const TOMBSTONES_PER_BLOCK: usize = 16;

/// How many dead ends are cleared at a time: more than one new one is made at a time, so that none are left in the end.
const DEAD_ENDS_AT_ONCE: usize = 8;

#[derive(Debug)]
struct Node {
    /// Of a root: itself.
    parent: NodeKey,
    root: NodeKey,
    /// The block that holds its tokens' keys and values, or has held them; of a root none.
    block: Option<BlockId>,
    /// When it was last inserted, or the end of a match: a reading of [`PrefixTree::clock`].
    used: u32,
    /// In the ring of leaves, for nodes without children.
    links: Links,
    children: Children,
    /// A sequence that holds what follows has let the block go: from then on it may be evicted before what follows it.
    passed: bool,
}

impl Node {
    fn new(parent: NodeKey, root: NodeKey, used: u32) -> Self {
        Self { parent, root, block: None, used, links: Links::default(), children: Children::default(), passed: false }
    }
}

#[derive(Debug)]
pub(crate) struct PrefixTree {
    nodes: Slab<Node>,
    /// The root of each key under which there is a node.
    roots: HashMap<PrefixKey, NodeKey>,
    /// The key of each root.
    keys: HashMap<NodeKey, PrefixKey>,
    /// Each block's node, with [`FOLLOWED`] if that has children; or 0.
    node_of: Vec<u32>,
    /// Each node's tokens, at `node * block_size`. Made when the first block is cached: a pool without prefix reuse pays
    /// nothing.
    tokens: Vec<u32>,
    /// Nodes that have a block.
    cached: usize,
    clock: u32,
    block_size: usize,
}

impl PrefixTree {
    pub(crate) fn new(blocks: usize, block_size: usize) -> Self {
        let mut nodes = Slab::new();
        nodes.insert(Node::new(ROOT, ROOT, 0));
        let keys = HashMap::from([(ROOT, PrefixKey::new())]);
        let node_of = vec![0; blocks];
        Self { nodes, roots: HashMap::new(), keys, node_of, tokens: Vec::new(), cached: 0, clock: 0, block_size }
    }

    #[inline]
    pub(crate) fn contains(&self, id: BlockId) -> bool {
        self.node_of[id.index()] != 0
    }

    /// Nodes that have lost their block.
    pub(crate) fn tombstones(&self) -> usize {
        self.nodes.len() - self.keys.len() - self.cached
    }

    pub(crate) fn has_too_many_tombstones(&self) -> bool {
        let blocks = self.node_of.len();
        // A key has 31 bits, and each node may have a root of its own.
        let keys = (FOLLOWED as usize / 2).saturating_sub(blocks);
        self.tombstones() > keys.min(TOMBSTONES_PER_BLOCK * blocks)
    }

    /// The node of a block that can be found.
    #[inline]
    fn node(&self, id: BlockId) -> Option<NodeKey> {
        Some(self.node_of[id.index()] & !FOLLOWED).filter(|&node| node != 0)
    }

    /// The block of a node, if it has one.
    #[inline]
    fn block(&self, node: NodeKey) -> Option<BlockId> {
        self.nodes[node as usize].block.filter(|&id| self.node_of[id.index()] & !FOLLOWED == node)
    }

    /// The node after which block number `at` of a sequence is found: that of the block before it, `last`, or the key's root.
    /// None if that block cannot be found itself, or was cached under another key.
    #[inline]
    fn start(&self, key: &PrefixKey, at: usize, last: Option<BlockId>) -> Option<NodeKey> {
        if at == 0 {
            return self.root(key);
        }
        let node = self.node(last?)?;
        (self.root(key) == Some(self.nodes[node as usize].root)).then_some(node)
    }

    #[inline]
    fn root(&self, key: &PrefixKey) -> Option<NodeKey> {
        if key.is_plain() { Some(ROOT) } else { self.roots.get(key).copied() }
    }

    /// As [`start`](Self::start); makes the root of a new key.
    pub(crate) fn start_or_root(&mut self, key: &PrefixKey, at: usize, last: Option<BlockId>) -> Option<NodeKey> {
        let start = self.start(key, at, last);
        if start.is_some() || at > 0 {
            return start;
        }
        let root = self.nodes.vacant_key() as NodeKey;
        self.nodes.insert(Node::new(root, root, self.clock));
        self.roots.insert(key.clone(), root);
        self.keys.insert(root, key.clone());
        Some(root)
    }

    /// The tokens of a block that can be found.
    #[inline]
    pub(crate) fn tokens(&self, id: BlockId) -> Option<&[u32]> {
        self.node(id).map(|node| self.tokens_of(node))
    }

    #[inline]
    fn tokens_of(&self, node: NodeKey) -> &[u32] {
        &self.tokens[node as usize * self.block_size..][..self.block_size]
    }

    /// Makes room for the tokens of the node that is inserted next, and hands it to the caller to fill;
    /// [`insert`](Self::insert) follows.
    pub(crate) fn next_tokens(&mut self) -> &mut [u32] {
        if self.tokens.is_empty() {
            let blocks = self.node_of.len();
            self.nodes.reserve(blocks);
            self.tokens = vec![0; (blocks + self.nodes.len()) * self.block_size];
        }
        let at = self.nodes.vacant_key() * self.block_size;
        if at + self.block_size > self.tokens.len() {
            self.tokens.resize(2 * self.tokens.len(), 0);
        }
        &mut self.tokens[at..][..self.block_size]
    }

    /// Caches a block after `parent`, under the tokens that were filled in just now. When there is a block with the same
    /// tokens, that one is returned beside the node, and nothing changes.
    #[inline]
    pub(crate) fn insert(&mut self, parent: NodeKey, id: BlockId) -> (NodeKey, Option<BlockId>) {
        debug_assert!(!self.contains(id), "{id:?} is cached already");
        let new = self.nodes.vacant_key() as NodeKey;
        let Self { nodes, tokens, block_size, .. } = self;
        let of = |node: NodeKey| &tokens[node as usize * *block_size..][..*block_size];
        let Node { children, root, .. } = &mut nodes[parent as usize];
        let (root, had_children) = (*root, !children.is_empty());
        let node = match children.get(of(new), of) {
            Some(node) => {
                self.touch(node);
                node
            }
            None => {
                children.insert(of(new), new, of);
                self.clock = self.clock.wrapping_add(1);
                nodes.insert(Node::new(parent, root, self.clock));
                if !had_children {
                    self.unlink_leaf(parent);
                    self.note_follower(parent, true);
                }
                self.link_hottest(new);
                new
            }
        };
        if let Some(same) = self.block(node) {
            return (node, Some(same));
        }
        let Node { block, children, .. } = &mut self.nodes[node as usize];
        *block = Some(id);
        self.node_of[id.index()] = if children.is_empty() { node } else { node | FOLLOWED };
        self.cached += 1;
        (node, None)
    }

    /// Notes that a node is used, so that its prefix stays longer than those that are not.
    #[inline]
    fn touch(&mut self, key: NodeKey) {
        self.clock = self.clock.wrapping_add(1);
        let node = &mut self.nodes[key as usize];
        node.used = self.clock;
        if node.children.is_empty() && node.parent != key {
            self.unlink_leaf(key);
            self.link_hottest(key);
        }
    }

    /// Notes at a node's block, if it has one, whether the node has children.
    fn note_follower(&mut self, node: NodeKey, has_children: bool) {
        if let Some(id) = self.block(node) {
            self.node_of[id.index()] = if has_children { node | FOLLOWED } else { node };
        }
    }

    /// Takes a block out of the tree: says whether it was there. Its node stays as long as another comes after it.
    #[inline]
    pub(crate) fn lose(&mut self, id: BlockId) -> bool {
        let node = std::mem::take(&mut self.node_of[id.index()]);
        if node == 0 {
            return false;
        }
        self.cached -= 1;
        if node & FOLLOWED == 0 {
            self.unlink_leaf(node);
            self.remove_leaf(node, false);
            self.clear_dead_ends();
        }
        true
    }

    /// Notes that a sequence that holds what follows these blocks has let them go.
    pub(crate) fn pass(&mut self, ids: &[BlockId]) {
        for id in ids {
            if let Some(node) = self.node(*id) {
                self.nodes[node as usize].passed = true;
            }
        }
    }

    /// Forgets the last block of tokens of the prefix that has not been used for longest, and what of it was in the pool, if
    /// anything. Called again, it goes on with the same prefix: one is lost, instead of a part of each.
    pub(crate) fn forget_coldest(&mut self) -> Option<Option<BlockId>> {
        let key = self.coldest_leaf()?;
        let block = self.block(key);
        if let Some(id) = block {
            self.node_of[id.index()] = 0;
            self.cached -= 1;
        }
        self.unlink_leaf(key);
        self.remove_leaf(key, true);
        Some(block)
    }

    /// Nodes that have neither a block nor children lead nowhere. They are the coldest leaves, and cleared a few at a time: a
    /// long sequence leaves a long row of them at once.
    fn clear_dead_ends(&mut self) {
        for _ in 0..DEAD_ENDS_AT_ONCE {
            let Some(key) = self.coldest_leaf().filter(|&key| self.block(key).is_none()) else { return };
            self.unlink_leaf(key);
            self.remove_leaf(key, false);
        }
    }

    /// Removes a node without block and children, which is in no ring any more. A parent that has no other child becomes a
    /// leaf: the coldest if it leads nowhere or `goes_whole`, unless it was used later than what followed it.
    fn remove_leaf(&mut self, key: NodeKey, goes_whole: bool) {
        let Node { parent, used, .. } = self.nodes.remove(key as usize);
        let Self { nodes, tokens, block_size, .. } = self;
        let of = |node: NodeKey| &tokens[node as usize * *block_size..][..*block_size];
        let above = &mut nodes[parent as usize];
        above.children.remove(of(key), of);
        if !above.children.is_empty() {
            return;
        }
        if above.parent == parent {
            if parent != ROOT {
                self.nodes.remove(parent as usize);
                if let Some(key) = self.keys.remove(&parent) {
                    self.roots.remove(&key);
                }
            }
            return;
        }
        let used_later = (above.used.wrapping_sub(used) as i32) > 0;
        self.note_follower(parent, false);
        if self.block(parent).is_none() || (goes_whole && !used_later) {
            self.link_coldest(parent);
        } else {
            self.link_hottest(parent);
        }
    }

    /// How many of these blocks, from the first on, are a path from a root, and that root's key.
    pub(crate) fn path(&self, ids: &[BlockId]) -> Option<(PrefixKey, usize)> {
        let first = &self.nodes[self.node(*ids.first()?)? as usize];
        if first.parent != first.root {
            return None;
        }
        let follows = |pair: &&[BlockId]| {
            self.node(pair[1]).is_some_and(|node| Some(self.nodes[node as usize].parent) == self.node(pair[0]))
        };
        Some((self.keys[&first.root].clone(), 1 + ids.windows(2).take_while(follows).count()))
    }

    /// What is wrong with the tree, if anything is.
    pub(crate) fn inconsistency(&self) -> Option<String> {
        let mut cached = 0;
        for (key, node) in &self.nodes {
            let key = key as NodeKey;
            if !node.children.is_consistent(|child| self.tokens_of(child)) {
                return Some(format!("the children of node {key} are out of order"));
            }
            let known = if node.parent == key {
                let of_key = self.keys.get(&key).and_then(|key| self.start(key, 0, None));
                node.root == key && of_key == Some(key) && (key == ROOT || !node.children.is_empty())
            } else {
                let block = self.block(key);
                cached += usize::from(block.is_some());
                let followed = if node.children.is_empty() { key } else { key | FOLLOWED };
                let above = self.nodes.get(node.parent as usize);
                above.is_some_and(|above| {
                    above.root == node.root
                        && above.children.get(self.tokens_of(key), |child| self.tokens_of(child)) == Some(key)
                }) && block.is_none_or(|id| self.node_of[id.index()] == followed)
            };
            if !known {
                return Some(format!("node {key} is not where its tokens lead"));
            }
        }
        let of_blocks = self.node_of.iter().filter(|&&node| node != 0).count();
        if (of_blocks, self.cached) != (cached, cached) {
            return Some(format!(
                "{of_blocks} blocks have a node, {cached} nodes a block, counted are {}",
                self.cached
            ));
        }
        if self.has_too_many_tombstones() {
            return Some(format!("{} nodes have no block", self.tombstones()));
        }
        self.leaf_inconsistency()
    }

    /// The blocks that follow `id` in the tree, if nothing but eviction in order may come between: through a window, or once
    /// a sequence has passed a block, what follows may outlive it.
    pub(crate) fn followers(&self, id: BlockId) -> Vec<BlockId> {
        let Some(node) = self.node(id).map(|node| &self.nodes[node as usize]) else { return Vec::new() };
        if node.passed || self.keys[&node.root].window.is_some() {
            return Vec::new();
        }
        node.children.nodes().into_iter().filter_map(|child| self.block(child)).collect()
    }
}
