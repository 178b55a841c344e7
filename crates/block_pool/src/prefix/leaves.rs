//! The leaves of the tree in the order in which they were used: which prefix goes when there are too many tombstones.

use super::{NodeKey, PrefixTree, ROOT};

/// A leaf's neighbours in a ring; the root of those without key, which is no leaf, is both its ends.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Links {
    colder: NodeKey,
    hotter: NodeKey,
}

impl PrefixTree {
    pub(super) fn coldest_leaf(&self) -> Option<NodeKey> {
        Some(self.links(ROOT).hotter).filter(|&key| key != ROOT)
    }

    pub(super) fn link_hottest(&mut self, key: NodeKey) {
        let hottest = self.links(ROOT).colder;
        self.link_between(hottest, key, ROOT);
    }

    pub(super) fn link_coldest(&mut self, key: NodeKey) {
        let coldest = self.links(ROOT).hotter;
        self.link_between(ROOT, key, coldest);
    }

    /// Takes a leaf out of the ring. Roots are never in it.
    pub(super) fn unlink_leaf(&mut self, key: NodeKey) {
        if self.nodes[key as usize].parent == key {
            return;
        }
        let Links { colder, hotter } = self.links(key);
        self.nodes[colder as usize].links.hotter = hotter;
        self.nodes[hotter as usize].links.colder = colder;
    }

    fn link_between(&mut self, colder: NodeKey, key: NodeKey, hotter: NodeKey) {
        self.nodes[key as usize].links = Links { colder, hotter };
        self.nodes[colder as usize].links.hotter = key;
        self.nodes[hotter as usize].links.colder = key;
    }

    fn links(&self, key: NodeKey) -> Links {
        self.nodes[key as usize].links
    }

    /// What is wrong with the ring, if anything is.
    pub(super) fn leaf_inconsistency(&self) -> Option<String> {
        let leaves = self.nodes.iter().filter(|(key, node)| node.parent as usize != *key && node.children.is_empty());
        let (mut linked, mut at) = (0, self.links(ROOT).hotter);
        while at != ROOT && linked <= self.nodes.len() {
            let node = &self.nodes[at as usize];
            if !node.children.is_empty() || self.links(node.links.hotter).colder != at {
                return Some(format!("node {at} is in the ring of leaves"));
            }
            (linked, at) = (linked + 1, node.links.hotter);
        }
        let leaves = leaves.count();
        (linked != leaves).then(|| format!("{leaves} leaves, {linked} in their ring"))
    }
}
