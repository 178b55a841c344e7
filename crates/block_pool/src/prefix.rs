//! Which blocks can be found by their tokens: a radix tree whose edges are blocks.
//!
//! A node is one full, written block; the path from a root to it spells the tokens of a prefix. There is one root for
//! each salt. The children of a node are sorted by their tokens, so that the child with the longest match, full or
//! partial, is beside the place where the tokens sought would stand. Tokens are always compared; there are no hashes
//! but the one that finds a salt's root, and that map compares salts.

use std::cmp::Ordering;
use std::collections::HashMap;

use slab::Slab;
use smallvec::SmallVec;

use crate::{BlockId, PoolEvent, Salt};

/// A node's key in the slab. The root of those without salt is always there and has key 0, so that 0 can stand for "no
/// node" wherever only a block's node is meant.
pub(crate) type NodeKey = u32;

const ROOT: NodeKey = 0;

#[derive(Debug)]
struct Node {
    kind: Kind,
    /// Sorted by tokens.
    children: SmallVec<[Child; 2]>,
}

/// A child beside the first of its tokens, which tells most children apart without reading their blocks.
#[derive(Debug, Clone, Copy)]
struct Child {
    first: u32,
    node: NodeKey,
}

#[derive(Debug)]
enum Kind {
    /// Boxed: there are few roots, and all other nodes are smaller for it.
    Root(Box<Salt>),
    Block {
        id: BlockId,
        parent: NodeKey,
    },
}

#[derive(Debug)]
pub(crate) struct PrefixTree {
    nodes: Slab<Node>,
    /// The roots of all salts that have a child.
    roots: HashMap<Salt, NodeKey>,
    /// Each block's node, or 0.
    node_of: Vec<NodeKey>,
    /// Each block's tokens, at `block * block_size`. Made when the first block is stored: a pool without prefix reuse
    /// pays nothing.
    tokens: Vec<u32>,
    block_size: usize,
}

impl PrefixTree {
    pub(crate) fn new(blocks: usize, block_size: usize) -> Self {
        let mut nodes = Slab::new();
        nodes.insert(Node { kind: Kind::Root(Box::default()), children: SmallVec::new() });
        Self { nodes, roots: HashMap::new(), node_of: vec![0; blocks], tokens: Vec::new(), block_size }
    }

    #[inline]
    pub(crate) fn contains(&self, id: BlockId) -> bool {
        self.node_of[id.index()] != 0
    }

    /// How many blocks can be found.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len() - 1 - self.roots.len()
    }

    /// The node behind which the block after `last` is found; the salt's root if there is no last one. None if that
    /// cannot be found itself.
    pub(crate) fn node(&self, salt: &Salt, last: Option<BlockId>) -> Option<NodeKey> {
        match last {
            Some(id) => Some(self.node_of[id.index()]).filter(|&node| node != 0),
            None if *salt == Salt::none() => Some(ROOT),
            None => self.roots.get(salt).copied(),
        }
    }

    /// The child with exactly these tokens, one block of them.
    #[inline]
    pub(crate) fn child(&self, parent: NodeKey, tokens: &[u32]) -> Option<(NodeKey, BlockId)> {
        let children = &self.nodes[parent as usize].children;
        let key = match children.as_slice() {
            [] => return None,
            // Most prefixes do not branch.
            &[only] if self.tokens_of(only.node) == tokens => only.node,
            [_] => return None,
            _ => children[self.search(parent, tokens).ok()?].node,
        };
        self.block(key).map(|id| (key, id))
    }

    /// The child that shares the most tokens with `tokens`, and how many.
    pub(crate) fn nearest_child(&self, parent: NodeKey, tokens: &[u32]) -> Option<(BlockId, usize)> {
        let children = &self.nodes[parent as usize].children;
        let at = match self.search(parent, tokens) {
            Ok(at) | Err(at) => at,
        };
        // In sorted order the longest common prefix is with a neighbour.
        children[at.saturating_sub(1)..children.len().min(at + 1)]
            .iter()
            .filter_map(|child| Some((self.block(child.node)?, common(self.tokens_of(child.node), tokens))))
            .max_by_key(|&(_, matching)| matching)
            .filter(|&(_, matching)| matching > 0)
    }

    /// Makes room for a block's tokens and hands it to the caller to fill; [`insert`](Self::insert) follows.
    pub(crate) fn tokens_mut(&mut self, id: BlockId) -> &mut [u32] {
        if self.tokens.is_empty() {
            let blocks = self.node_of.len();
            self.tokens = vec![0; blocks * self.block_size];
            self.nodes.reserve(blocks);
        }
        &mut self.tokens[id.index() * self.block_size..][..self.block_size]
    }

    /// The tokens of a block, as far as they were told.
    pub(crate) fn tokens(&self, id: BlockId) -> &[u32] {
        &self.tokens[id.index() * self.block_size..][..self.block_size]
    }

    /// The root of a salt, made if there is none.
    pub(crate) fn root(&mut self, salt: &Salt) -> NodeKey {
        if let Some(root) = self.node(salt, None) {
            return root;
        }
        let root =
            self.nodes.insert(Node { kind: Kind::Root(Box::new(salt.clone())), children: SmallVec::new() }) as NodeKey;
        self.roots.insert(salt.clone(), root);
        root
    }

    /// Stores a block behind `parent`, unless one with the same tokens is there: then that one is returned.
    pub(crate) fn insert(&mut self, parent: NodeKey, id: BlockId) -> Result<NodeKey, (NodeKey, BlockId)> {
        debug_assert!(!self.contains(id), "{id:?} is stored already");
        let tokens = self.tokens(id);
        let at = match self.search(parent, tokens) {
            Err(at) => at,
            Ok(at) => {
                let same = self.nodes[parent as usize].children[at].node;
                return self.block(same).map_or(Ok(same), |id| Err((same, id)));
            }
        };
        let first = first(tokens);
        let node = Node { kind: Kind::Block { id, parent }, children: SmallVec::new() };
        let key = self.nodes.insert(node) as NodeKey;
        self.node_of[id.index()] = key;
        self.nodes[parent as usize].children.insert(at, Child { first, node: key });
        Ok(key)
    }

    /// The block behind `id` that was stored last in the order of tokens, if any is.
    pub(crate) fn last_child(&self, id: BlockId) -> Option<BlockId> {
        let node = self.node_of[id.index()];
        self.nodes[node as usize].children.last().and_then(|child| self.block(child.node))
    }

    /// Forgets a block that has no children.
    pub(crate) fn remove(&mut self, id: BlockId) {
        let key = std::mem::take(&mut self.node_of[id.index()]);
        let Kind::Block { parent, .. } = self.nodes[key as usize].kind else { return };
        debug_assert!(self.nodes[key as usize].children.is_empty(), "children go before their parent");
        // An only child is known without its tokens, which are not in any cache by now.
        let at = match self.nodes[parent as usize].children.len() {
            1 => Ok(0),
            _ => self.search(parent, self.tokens(id)),
        };
        if let Ok(at) = at {
            self.nodes[parent as usize].children.remove(at);
        }
        self.nodes.remove(key as usize);
        let parent_node = &self.nodes[parent as usize];
        if let (Kind::Root(salt), true, true) = (&parent_node.kind, parent_node.children.is_empty(), parent != ROOT) {
            self.roots.remove(&**salt);
            self.nodes.remove(parent as usize);
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.nodes.clear();
        self.nodes.insert(Node { kind: Kind::Root(Box::default()), children: SmallVec::new() });
        self.roots.clear();
        self.node_of.fill(0);
    }

    /// How many of these blocks, from the first on, are a path from a root, and that root's salt.
    pub(crate) fn path(&self, ids: &[BlockId]) -> Option<(Salt, usize)> {
        let parent = |id: BlockId| match self.nodes[self.node_of[id.index()] as usize].kind {
            Kind::Block { parent, .. } => Some(parent),
            Kind::Root(_) => None,
        };
        let root = parent(*ids.first()?)?;
        let Kind::Root(salt) = &self.nodes[root as usize].kind else { return None };
        let steps = ids.windows(2).take_while(|pair| parent(pair[1]) == Some(self.node_of[pair[0].index()])).count();
        Some(((**salt).clone(), 1 + steps))
    }

    /// The events that would have built this tree: parents before their children.
    pub(crate) fn events(&self) -> Vec<PoolEvent> {
        let mut events = Vec::with_capacity(self.len());
        let mut open: Vec<(NodeKey, Option<BlockId>, &Salt)> = self
            .nodes
            .iter()
            .filter_map(|(key, node)| match &node.kind {
                Kind::Root(salt) => Some((key as NodeKey, None, &**salt)),
                Kind::Block { .. } => None,
            })
            .collect();
        while let Some((key, parent, salt)) = open.pop() {
            for &Child { node: child, .. } in &self.nodes[key as usize].children {
                let Some(block) = self.block(child) else { continue };
                let tokens = self.tokens_of(child).to_vec();
                events.push(PoolEvent::Stored { block, parent, tokens, salt: salt.clone() });
                open.push((child, Some(block), salt));
            }
        }
        events
    }

    /// What is wrong with the tree, if anything is.
    pub(crate) fn inconsistency(&self) -> Option<String> {
        for (key, node) in &self.nodes {
            if !node.children.is_sorted_by(|a, b| self.tokens_of(a.node) < self.tokens_of(b.node)) {
                return Some(format!("the children of node {key} are out of order"));
            }
            if node.children.iter().any(|child| child.first != first(self.tokens_of(child.node))) {
                return Some(format!("a child of node {key} stands beside the wrong token"));
            }
            let known = match &node.kind {
                Kind::Root(salt) => self.node(salt, None) == Some(key as NodeKey),
                Kind::Block { id, parent } => {
                    let siblings = self.nodes.get(*parent as usize).map(|parent| &parent.children);
                    self.node_of[id.index()] as usize == key
                        && siblings.is_some_and(|siblings| siblings.iter().any(|child| child.node as usize == key))
                }
            };
            if !known {
                return Some(format!("node {key} is not where its tokens lead"));
            }
        }
        let nodes = self.node_of.iter().filter(|&&node| node != 0).count();
        (nodes != self.len()).then(|| format!("{nodes} blocks have a node, the tree has {}", self.len()))
    }

    /// Where among the children of `parent` these tokens stand, or would stand.
    fn search(&self, parent: NodeKey, tokens: &[u32]) -> Result<usize, usize> {
        let children = &self.nodes[parent as usize].children;
        match children.as_slice() {
            [] => Err(0),
            &[only] => match self.tokens_of(only.node).cmp(tokens) {
                Ordering::Equal => Ok(0),
                Ordering::Less => Err(1),
                Ordering::Greater => Err(0),
            },
            children => {
                let first = first(tokens);
                children.binary_search_by(|child| {
                    child.first.cmp(&first).then_with(|| self.tokens_of(child.node).cmp(tokens))
                })
            }
        }
    }

    fn block(&self, key: NodeKey) -> Option<BlockId> {
        match self.nodes[key as usize].kind {
            Kind::Block { id, .. } => Some(id),
            Kind::Root(_) => None,
        }
    }

    fn tokens_of(&self, key: NodeKey) -> &[u32] {
        self.block(key).map_or(&[], |id| self.tokens(id))
    }
}

/// The first of a block's tokens. Of none, which come before all others, 0: as the smallest token does.
fn first(tokens: &[u32]) -> u32 {
    tokens.first().copied().unwrap_or(0)
}

/// How many tokens two sequences share at their start.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
