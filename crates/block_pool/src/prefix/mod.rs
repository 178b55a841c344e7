//! The prefix tree, which finds blocks by their tokens: a radix tree whose edges are blocks of tokens.
//!
//! The path from a root to a node spells the tokens of a prefix, and there is one root for each [`PrefixKey`]. A node
//! has a block in each group of layers whose keys and values of its tokens are in the pool. It can lose them all and
//! keep its tokens and its position in the tree, as a *tombstone*, because the nodes below it may still be found:
//! through a window, only the last blocks of a prefix are needed.
//!
//! Two dense arrays map nodes to blocks and blocks to nodes. So evicting a block whose node has children reads no node.
//! The blocks of all groups are numbered together there: see [`Entry`].
//!
//! Where salts begin in a block, they are a part of the edge to its node, like its tokens: a node has a set of children
//! for each list of salts, and a search that knows the salts looks in that set only.
//!
//! Tokens and salts are always compared. The only hash is the one that finds a key's root, and that map compares keys,
//! too.

mod children;
mod leaves;
mod lineage;
mod matching;
mod past;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use slab::Slab;
use smallvec::SmallVec;

use crate::{BlockId, PrefixKey, SaltFrom, Span};
use children::Children;
use leaves::Leaves;

pub(crate) use lineage::Lineage;
pub(crate) use past::Past;

/// A node's index in the slab. The root of [`PrefixKey::new`] always exists and has index 0, so that 0 can stand for
/// "no node" where only the node of a block is meant.
pub(crate) type NodeKey = u32;

/// A block's index among the blocks of all groups: those of the first group come first. With one group it is the
/// block's own index.
pub(crate) type Entry = usize;

const ROOT: NodeKey = 0;
/// A flag in [`PrefixTree::node_of`], in addition to the node: the node has children.
const HAS_CHILDREN: u32 = 1 << 31;
/// In [`PrefixTree::block_of`]: no block in this group. It is 0 because zeroed memory that was never touched costs nothing.
const NONE: u32 = 0;

/// The most tombstones for each block of the pool. A tombstone takes some hundred bytes. Without a limit, an endless
/// sequence with a window would leave one for each block of tokens that has left the window.
const TOMBSTONES_PER_BLOCK: usize = 16;

/// How many dead ends are cleared at a time. It is more than the number of new ones at a time, so that none are left in
/// the end.
const DEAD_ENDS_AT_ONCE: usize = 8;

#[derive(Debug)]
struct Node {
    /// The parent; a root is its own parent.
    parent: NodeKey,
    root: NodeKey,
    /// When the node was last inserted or was the end of a match: a value of [`PrefixTree::clock`].
    used: u32,
    children: Children,
    /// In groups whose tokens see all tokens before them, the block may be evicted before the blocks that follow it: a
    /// sequence has freed it and kept those, or the node got a new block after those were cached.
    passed: bool,
    /// A node where sequences part lies so close after this one that the window of a token there reaches this node.
    near_branch: bool,
}

impl Node {
    fn new(parent: NodeKey, root: NodeKey, used: u32) -> Self {
        Self { parent, root, used, children: Children::default(), passed: false, near_branch: false }
    }
}

#[derive(Debug)]
pub(crate) struct PrefixTree {
    nodes: Slab<Node>,
    /// The root of each key that has nodes.
    roots: HashMap<PrefixKey, NodeKey>,
    /// The key of each root.
    keys: HashMap<NodeKey, PrefixKey>,
    /// The salts that begin in the block of a node, for each node in which any do.
    salts: HashMap<NodeKey, Arc<[SaltFrom]>>,
    /// The node of each block of any group, with [`HAS_CHILDREN`] if the node has any; 0 if the block is not cached.
    node_of: Vec<u32>,
    /// For each node and each group, at `node * groups + group`, one more than the index of its block, or [`NONE`].
    block_of: Vec<u32>,
    /// The span and the entry of the first block of each group.
    groups: SmallVec<[(Span, Entry); 1]>,
    /// How many groups there are.
    stride: usize,
    /// The nodes without children, except roots.
    leaves: Leaves,
    /// What each node's blocks contain, if blocks that leave go to a tier.
    lineages: Option<Vec<Option<Arc<Lineage>>>>,
    /// Each node's tokens, at `node * block_size`. Allocated when the first block is cached: a pool without prefix
    /// caching pays nothing.
    tokens: Vec<u32>,
    /// How many nodes have a block in any group.
    cached: usize,
    clock: u32,
    most_tombstones: usize,
    block_size: usize,
}

impl PrefixTree {
    /// A tree for `blocks` blocks of all groups. `groups` are the span and the first entry of each.
    pub(crate) fn new(blocks: usize, groups: SmallVec<[(Span, Entry); 1]>, block_size: usize) -> Self {
        let mut nodes = Slab::new();
        nodes.insert(Node::new(ROOT, ROOT, 0));
        // A node's index has 31 bits, and each node may have a root of its own.
        let keys = (HAS_CHILDREN as usize / 2).saturating_sub(blocks);
        Self {
            nodes,
            roots: HashMap::new(),
            keys: HashMap::from([(ROOT, PrefixKey::new())]),
            salts: HashMap::new(),
            node_of: vec![0; blocks],
            block_of: Vec::new(),
            stride: groups.len(),
            groups,
            leaves: Leaves::default(),
            lineages: None,
            tokens: Vec::new(),
            cached: 0,
            clock: 0,
            most_tombstones: keys.min(TOMBSTONES_PER_BLOCK * blocks),
            block_size,
        }
    }

    #[inline]
    pub(crate) fn contains(&self, entry: Entry) -> bool {
        self.node_of[entry] != 0
    }

    /// How many nodes have lost their block.
    pub(crate) fn tombstones(&self) -> usize {
        self.nodes.len() - self.keys.len() - self.cached
    }

    #[inline]
    pub(crate) fn has_too_many_tombstones(&self) -> bool {
        self.tombstones() > self.most_tombstones
    }

    /// The node of a cached block.
    #[inline]
    fn node(&self, entry: Entry) -> Option<NodeKey> {
        Some(self.node_of[entry] & !HAS_CHILDREN).filter(|&node| node != 0)
    }

    /// The block of a node in a group, if it has one.
    #[inline]
    pub(crate) fn block(&self, node: NodeKey, group: usize) -> Option<BlockId> {
        let index = self.block_of.get(node as usize * self.stride + group)?.checked_sub(1)?;
        Some(BlockId::new(index as usize))
    }

    /// The blocks of a node, each with its group.
    #[inline]
    fn blocks(&self, node: NodeKey) -> impl Iterator<Item = (usize, BlockId)> + '_ {
        (0..self.stride).filter_map(move |group| Some((group, self.block(node, group)?)))
    }

    /// Whether the node has a block in any group.
    #[inline]
    fn has_block(&self, node: NodeKey) -> bool {
        self.block(node, 0).is_some() || (1..self.stride).any(|group| self.block(node, group).is_some())
    }

    /// The node below which block number `at` of a sequence is found: that of the block before it, `last`, or the key's
    /// root. `None` if that block is not cached, or was cached under another key.
    #[inline]
    fn start(&self, key: &PrefixKey, at: usize, last: Option<Entry>) -> Option<NodeKey> {
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

    /// Does the same as [`start`](Self::start), and makes the root of a new key.
    pub(crate) fn start_or_root(&mut self, key: &PrefixKey, at: usize, last: Option<Entry>) -> Option<NodeKey> {
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

    /// The tokens of a cached block.
    #[inline]
    pub(crate) fn tokens(&self, entry: Entry) -> Option<&[u32]> {
        self.node(entry).map(|node| self.tokens_of(node))
    }

    #[inline]
    pub(crate) fn tokens_of(&self, node: NodeKey) -> &[u32] {
        &self.tokens[node as usize * self.block_size..][..self.block_size]
    }

    /// Makes room for the tokens of the node that is inserted next, and returns it for the caller to fill. Call
    /// [`insert`](Self::insert) next.
    pub(crate) fn next_tokens(&mut self) -> &mut [u32] {
        if self.tokens.is_empty() {
            let (blocks, nodes) = (self.node_of.len(), self.node_of.len() + self.nodes.len());
            self.nodes.reserve(blocks);
            (self.block_of, self.leaves) = (vec![NONE; nodes * self.stride], Leaves::with_room(nodes));
            self.tokens = vec![0; nodes * self.block_size];
        }
        let node = self.nodes.vacant_key();
        if node * self.stride >= self.block_of.len() {
            self.make_room(2 * node);
        }
        &mut self.tokens[node * self.block_size..][..self.block_size]
    }

    #[cold]
    fn make_room(&mut self, nodes: usize) {
        self.block_of.resize(nodes * self.stride, NONE);
        self.leaves.make_room(nodes);
        self.tokens.resize(nodes * self.block_size, 0);
    }

    /// Returns the node after `parent` with the tokens that were filled in last, and whether it was made for this. No salt
    /// begins in its block. The caller gives it a block at once, with [`set_block`](Self::set_block).
    #[inline(always)]
    pub(crate) fn insert(&mut self, parent: NodeKey) -> (NodeKey, bool) {
        let new = self.nodes.vacant_key() as NodeKey;
        let Self { nodes, tokens, block_size, .. } = self;
        let of = |node: NodeKey| &tokens[node as usize * *block_size..][..*block_size];
        let above = &mut nodes[parent as usize];
        if let Some(known) = above.children.get(of(new), of) {
            return (known, false);
        }
        let (before, is_root, root) = (above.children.len(), above.parent == parent, above.root);
        above.children.insert(of(new), new, of);
        self.attach(parent, new, root, (before, is_root));
        (new, true)
    }

    /// Does the same as [`insert`](Self::insert) for a block in which these salts begin, at least one.
    #[inline(never)]
    pub(crate) fn insert_salted(&mut self, parent: NodeKey, salts: &[SaltFrom]) -> (NodeKey, bool) {
        let new = self.nodes.vacant_key() as NodeKey;
        let Self { nodes, tokens, block_size, .. } = self;
        let of = |node: NodeKey| &tokens[node as usize * *block_size..][..*block_size];
        let above = &mut nodes[parent as usize];
        if let Some(known) = above.children.with_salts(salts).and_then(|children| children.get(of(new), of)) {
            return (known, false);
        }
        let (before, is_root, root) = (above.children.len(), above.parent == parent, above.root);
        let stored = above.children.insert_salted(salts, of(new), new, of);
        self.salts.insert(new, stored);
        self.attach(parent, new, root, (before, is_root));
        (new, true)
    }

    /// Makes the node `new`, which is among the children of `parent` already. There were `before` others, and the parent
    /// may be a root.
    #[inline(always)]
    fn attach(&mut self, parent: NodeKey, new: NodeKey, root: NodeKey, (before, is_root): (usize, bool)) {
        self.clock = self.clock.wrapping_add(1);
        self.nodes.insert(Node::new(parent, root, self.clock));
        if before == 0 && !is_root {
            self.leaves.extend(parent, new);
            self.set_has_children(parent, HAS_CHILDREN);
        } else {
            self.leaves.insert_hottest(new);
        }
        if before == 1 && !is_root {
            self.mark_branch(parent);
        }
        if self.lineages.is_some() {
            self.add_lineage(parent, new);
        }
    }

    /// Gives a node a block in a group. If it has one there, nothing changes, and that block is returned.
    #[inline(always)]
    pub(crate) fn set_block(&mut self, (node, is_new): (NodeKey, bool), group: usize, id: BlockId) -> Option<BlockId> {
        let (at, entry) = (node as usize * self.stride + group, self.entry(group, id));
        debug_assert!(!self.contains(entry), "{id:?} is cached already");
        if let Some(same) = self.block_of[at].checked_sub(1) {
            return Some(BlockId::new(same as usize));
        }
        self.cached += usize::from(self.stride == 1 || !self.has_block(node));
        let mut has_children = false;
        if !is_new {
            has_children = !self.nodes[node as usize].children.is_empty();
            // The blocks that follow may be in use by sequences that used the node's former block.
            self.nodes[node as usize].passed |= self.groups[group].0.is_all();
            self.touch(node);
        }
        self.block_of[at] = id.index() as u32 + 1;
        self.node_of[entry] = node | if has_children { HAS_CHILDREN } else { 0 };
        None
    }

    /// The entry of a group's block.
    #[inline]
    fn entry(&self, group: usize, id: BlockId) -> Entry {
        if group == 0 { id.index() } else { self.groups[group].1 + id.index() }
    }

    /// Sequences part at this node: notes which blocks before it a token there sees through a window.
    #[cold]
    fn mark_branch(&mut self, mut node: NodeKey) {
        let window = self.keys.get(&self.nodes[node as usize].root).and_then(|key| key.window);
        let spans = self.groups.iter().map(|(span, _)| span.narrowed_by(window)).filter(|span| !span.is_all());
        let reach = spans.map(|span| span.reach(self.block_size)).max().unwrap_or(0);
        for _ in 0..reach {
            let at = &mut self.nodes[node as usize];
            if at.parent == node {
                return;
            }
            at.near_branch = true;
            node = at.parent;
        }
    }

    /// The blocks of a group that come this many steps before a cached block, in the prefix that it is cached under.
    pub(crate) fn blocks_before(&self, group: usize, entry: Entry, back: Range<usize>) -> SmallVec<[BlockId; 4]> {
        let parent = |node: &NodeKey| Some(self.nodes[*node as usize].parent).filter(|parent| parent != node);
        let path = std::iter::successors(self.node(entry), parent);
        path.enumerate().take(back.end).skip(back.start).filter_map(|(_, node)| self.block(node, group)).collect()
    }

    /// Whether a later sequence that parts from others close after this cached block would see the block.
    pub(crate) fn is_near_branch(&self, entry: Entry) -> bool {
        self.node(entry).is_some_and(|node| self.nodes[node as usize].near_branch)
    }

    /// Marks a node as used now, so that its prefix is dropped later than those not used since.
    #[inline]
    fn touch(&mut self, key: NodeKey) {
        self.clock = self.clock.wrapping_add(1);
        let node = &mut self.nodes[key as usize];
        node.used = self.clock;
        if node.children.is_empty() && node.parent != key {
            self.leaves.remove(key);
            self.leaves.insert_hottest(key);
        }
    }

    /// Writes `flag`, which is [`HAS_CHILDREN`] or 0, to the entries of the node's blocks.
    #[inline]
    fn set_has_children(&mut self, node: NodeKey, flag: u32) {
        for group in 0..self.stride {
            if let Some(id) = self.block(node, group) {
                let entry = self.entry(group, id);
                self.node_of[entry] = node | flag;
            }
        }
    }

    /// Takes a block of a group out of the tree. Returns whether it was there. Its node stays while it has children or
    /// another block.
    #[inline]
    pub(crate) fn remove_block(&mut self, group: usize, entry: Entry) -> bool {
        let (node, has_children) = match std::mem::take(&mut self.node_of[entry]) {
            0 => return false,
            node => (node & !HAS_CHILDREN, node & HAS_CHILDREN != 0),
        };
        self.block_of[node as usize * self.stride + group] = NONE;
        self.count_removed(node);
        if self.stride > 1 && self.has_block(node) {
            return true;
        }
        self.cached -= 1;
        if !has_children {
            self.remove_leaf(node);
            if self.tombstones() > 0 {
                self.clear_dead_ends();
            }
        }
        true
    }

    /// Notes that a sequence has freed this block and keeps using blocks that follow it.
    pub(crate) fn mark_passed(&mut self, group: usize, entry: Entry) {
        if let Some(node) = self.node(entry) {
            self.nodes[node as usize].passed |= self.groups[group].0.is_all();
        }
    }

    /// Drops the coldest leaf, which is the last node of the least recently used prefix. Returns the leaf's blocks, each
    /// with its group; `None` if there is no leaf. The next call continues with the same prefix, so that one prefix is
    /// lost as a whole, instead of a part of each.
    pub(crate) fn drop_coldest(&mut self) -> Option<SmallVec<[(usize, BlockId); 1]>> {
        let key = self.leaves.coldest()?;
        let blocks: SmallVec<_> = self.blocks(key).collect();
        for &(group, id) in &blocks {
            let entry = self.entry(group, id);
            (self.node_of[entry], self.block_of[key as usize * self.stride + group]) = (0, NONE);
        }
        self.cached -= usize::from(!blocks.is_empty());
        self.remove_leaf(key);
        Some(blocks)
    }

    /// Removes dead ends: nodes that have neither a block nor children. They are the coldest leaves. At most
    /// [`DEAD_ENDS_AT_ONCE`] are removed at a time, because a long sequence can leave a long row of them at once.
    fn clear_dead_ends(&mut self) {
        for _ in 0..DEAD_ENDS_AT_ONCE {
            let Some(key) = self.leaves.coldest().filter(|&key| !self.has_block(key)) else { return };
            self.remove_leaf(key);
        }
    }

    /// Removes a node without block and children. If its parent has no other child, the parent becomes a leaf instead:
    /// the coldest if it is a dead end, the hottest if it was used later than the removed node.
    fn remove_leaf(&mut self, key: NodeKey) {
        let Node { parent, used, .. } = self.nodes.remove(key as usize);
        self.remove_lineage(key);
        let Self { nodes, tokens, block_size, salts, .. } = self;
        let of = |node: NodeKey| &tokens[node as usize * *block_size..][..*block_size];
        let above = &mut nodes[parent as usize];
        above.children.remove(of(key), of, || salts.remove(&key));
        let (has_children, is_root) = (!above.children.is_empty(), above.parent == parent);
        let used_later = (above.used.wrapping_sub(used) as i32) > 0;
        if has_children || is_root {
            self.leaves.remove(key);
            if !has_children && parent != ROOT {
                self.nodes.remove(parent as usize);
                if let Some(key) = self.keys.remove(&parent) {
                    self.roots.remove(&key);
                }
            }
            return;
        }
        self.set_has_children(parent, 0);
        let has_block = self.has_block(parent);
        if has_block && !used_later {
            self.leaves.replace(key, parent);
            return;
        }
        self.leaves.remove(key);
        if has_block {
            self.leaves.insert_hottest(parent);
        } else {
            self.leaves.insert_coldest(parent);
        }
    }

    /// The salts that begin in a cached block.
    pub(crate) fn salts(&self, entry: Entry) -> &[SaltFrom] {
        self.node(entry).and_then(|node| self.salts.get(&node)).map_or(&[], |salts| salts)
    }

    /// How many of these blocks, from the first on, are a path from a root; and the key of that root.
    pub(crate) fn path(&self, entries: &[Entry]) -> Option<(PrefixKey, usize)> {
        let first = &self.nodes[self.node(*entries.first()?)? as usize];
        if first.parent != first.root {
            return None;
        }
        let follows = |pair: &&[Entry]| {
            self.node(pair[1]).is_some_and(|node| Some(self.nodes[node as usize].parent) == self.node(pair[0]))
        };
        Some((self.keys[&first.root].clone(), 1 + entries.windows(2).take_while(follows).count()))
    }

    /// Whether a cached block is at the end of these tokens, whole blocks, under this key. `salts` are those that begin in
    /// the block with a number.
    pub(crate) fn is_at_end_of<'a>(
        &self,
        entry: Entry,
        key: &PrefixKey,
        tokens: &[u32],
        salts: impl Fn(usize) -> &'a [SaltFrom],
    ) -> bool {
        let Some(mut node) = self.node(entry) else { return false };
        for (number, tokens) in tokens.chunks_exact(self.block_size).enumerate().rev() {
            let parent = self.nodes[node as usize].parent;
            let own = self.salts.get(&node).map_or(&[][..], |salts| salts);
            if parent == node || tokens != self.tokens_of(node) || own != salts(number) {
                return false;
            }
            node = parent;
        }
        self.root(key) == Some(node)
    }

    /// Describes what is wrong with the tree, if anything is.
    pub(crate) fn inconsistency(&self) -> Option<String> {
        let (mut cached, mut blocks) = (0, 0);
        for (key, node) in &self.nodes {
            let key = key as NodeKey;
            if !node.children.is_consistent(|child| self.tokens_of(child)) {
                return Some(format!("the children of node {key} are out of order"));
            }
            let known = if node.parent == key {
                let of_key = self.keys.get(&key).and_then(|key| self.start(key, 0, None));
                node.root == key && of_key == Some(key) && (key == ROOT || !node.children.is_empty())
            } else {
                cached += usize::from(self.has_block(key));
                blocks += self.blocks(key).count();
                let expected = if node.children.is_empty() { key } else { key | HAS_CHILDREN };
                let above = self.nodes.get(node.parent as usize);
                above.is_some_and(|above| {
                    let salts = self.salts.get(&key).map_or(&[][..], |salts| salts);
                    let children = above.children.with_salts(salts);
                    let same = |children: &Children| {
                        children.get(self.tokens_of(key), |child| self.tokens_of(child)) == Some(key)
                    };
                    above.root == node.root && children.is_some_and(same)
                }) && self.blocks(key).all(|(group, id)| self.node_of[self.entry(group, id)] == expected)
            };
            if !known {
                return Some(format!("node {key} is not found by its tokens"));
            }
        }
        if let Some(node) = self.salts.keys().find(|node| !self.nodes.contains(**node as usize)) {
            return Some(format!("node {node} does not exist, but has salts"));
        }
        let of_blocks = self.node_of.iter().filter(|&&node| node != 0).count();
        if (of_blocks, self.cached) != (blocks, cached) {
            return Some(format!(
                "{of_blocks} blocks have a node, and nodes have {blocks}; {cached} nodes have a block, {} are counted",
                self.cached
            ));
        }
        if self.tombstones() > TOMBSTONES_PER_BLOCK * self.node_of.len() {
            return Some(format!("there are {} tombstones, too many", self.tombstones()));
        }
        self.leaf_inconsistency()
    }

    /// The cached blocks of the same group that follow a block in the tree and must be evicted before it. There are none
    /// if the group or the key has a window, or if a sequence has freed this block earlier than those that follow: then
    /// they may stay longer.
    pub(crate) fn followers(&self, group: usize, entry: Entry) -> Vec<BlockId> {
        let Some(node) = self.node(entry).map(|node| &self.nodes[node as usize]) else { return Vec::new() };
        if node.passed || !self.groups[group].0.is_all() || self.keys[&node.root].window.is_some() {
            return Vec::new();
        }
        node.children.nodes().into_iter().filter_map(|child| self.block(child, group)).collect()
    }
}
