//! The leaves of the tree in the order of their last use: which prefix is dropped when there are too many tombstones.

use super::{NodeKey, PrefixTree, ROOT};

/// The leaves as a ring of links. The links change often, so they are not in the nodes, which are larger: when a chain
/// grows or is evicted, each of its nodes is a leaf for a while.
#[derive(Debug, Default)]
pub(super) struct Leaves {
    /// `[colder, hotter]` of each node; only the entries of leaves are valid. The entry of `ROOT`, which is no leaf, is
    /// both ends.
    links: Vec<[NodeKey; 2]>,
}

const COLDER: usize = 0;
const HOTTER: usize = 1;

impl Leaves {
    /// Room for this many nodes, none of which is a leaf.
    pub(super) fn with_room(nodes: usize) -> Self {
        Self { links: vec![[ROOT; 2]; nodes] }
    }

    /// Makes room for this many nodes.
    pub(super) fn make_room(&mut self, nodes: usize) {
        self.links.resize(nodes, [ROOT; 2]);
    }

    pub(super) fn coldest(&self) -> Option<NodeKey> {
        Some(self.links.first()?[HOTTER]).filter(|&node| node != ROOT)
    }

    #[inline]
    pub(super) fn insert_hottest(&mut self, node: NodeKey) {
        self.insert_between(self.links[ROOT as usize][COLDER], node, ROOT);
    }

    #[inline]
    pub(super) fn insert_coldest(&mut self, node: NodeKey) {
        self.insert_between(ROOT, node, self.links[ROOT as usize][HOTTER]);
    }

    #[inline]
    pub(super) fn remove(&mut self, node: NodeKey) {
        let [colder, hotter] = self.links[node as usize];
        self.links[colder as usize][HOTTER] = hotter;
        self.links[hotter as usize][COLDER] = colder;
    }

    /// Replaces a node in the ring.
    #[inline]
    pub(super) fn replace(&mut self, old: NodeKey, new: NodeKey) {
        let [colder, hotter] = self.links[old as usize];
        self.insert_between(colder, new, hotter);
    }

    /// Replaces a parent, which is no longer a leaf, by its child, which becomes the hottest.
    #[inline(always)]
    pub(super) fn extend(&mut self, parent: NodeKey, child: NodeKey) {
        if self.links[parent as usize][HOTTER] == ROOT {
            self.replace(parent, child);
        } else {
            self.remove(parent);
            self.insert_hottest(child);
        }
    }

    #[inline]
    fn insert_between(&mut self, colder: NodeKey, node: NodeKey, hotter: NodeKey) {
        self.links[node as usize] = [colder, hotter];
        self.links[colder as usize][HOTTER] = node;
        self.links[hotter as usize][COLDER] = node;
    }

    /// From the coldest to the hottest.
    fn iter(&self) -> impl Iterator<Item = NodeKey> + '_ {
        let next = |node: &NodeKey| Some(self.links[*node as usize][HOTTER]).filter(|&node| node != ROOT);
        std::iter::successors(self.coldest(), next)
    }
}

impl PrefixTree {
    /// Describes what is wrong with the ring, if anything is.
    pub(super) fn leaf_inconsistency(&self) -> Option<String> {
        let is_leaf = |node: NodeKey| {
            let found = self.nodes.get(node as usize);
            found.is_some_and(|found| found.parent != node && found.children.is_empty())
        };
        let linked: Vec<NodeKey> = self.leaves.iter().take(self.nodes.len()).collect();
        if let Some(node) = linked.iter().find(|&&node| !is_leaf(node)) {
            return Some(format!("node {node} is in the ring of leaves, but is no leaf"));
        }
        let leaves = self.nodes.iter().filter(|(node, _)| is_leaf(*node as NodeKey)).count();
        (linked.len() != leaves).then(|| format!("there are {leaves} leaves, but {} in their ring", linked.len()))
    }
}
