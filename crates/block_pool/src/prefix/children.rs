//! The children of a node, sorted by their tokens.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use smallvec::SmallVec;

use super::NodeKey;
use crate::SaltFrom;

/// Up to this many children are a sorted list. A search in it is faster than in a map, because it reads eight bytes per
/// child. An insertion moves 16 KB at most.
const FEW: usize = 2048;

/// The children of a node, sorted by their tokens: the child with the longest match, full or partial, is next to the
/// position where the searched tokens would be inserted.
#[derive(Debug)]
pub(super) enum Children {
    Few(SmallVec<[Child; 2]>),
    /// A map with a copy of the tokens as keys. Inserting into a list of a hundred thousand children would move half of
    /// it.
    Many(BTreeMap<Box<[u32]>, NodeKey>),
    /// Salts begin in some of the children. All calls that are given no salts are for the others.
    Salted(Box<Salted>),
}

/// Children in which no salt begins, and, for each list of salts, those in which these begin: at least one.
#[derive(Debug, Default)]
pub(super) struct Salted {
    plain: Children,
    of_salts: BTreeMap<Arc<[SaltFrom]>, Children>,
    /// How many children there are in all.
    len: usize,
}

/// A child, and the first of its tokens, which distinguishes most children without reading their other tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Child {
    first: u32,
    node: NodeKey,
}

/// The result of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Near {
    /// The child with exactly these tokens.
    Exact(NodeKey),
    /// The children before and after the position where the tokens would be inserted.
    Between([Option<NodeKey>; 2]),
}

impl Default for Children {
    fn default() -> Self {
        Self::Few(SmallVec::new())
    }
}

impl Children {
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Few(children) => children.is_empty(),
            Self::Many(children) => children.is_empty(),
            Self::Salted(_) => false,
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Few(children) => children.len(),
            Self::Many(children) => children.len(),
            Self::Salted(salted) => salted.len,
        }
    }

    /// Whether salts begin in some of the children.
    #[inline]
    pub(super) fn are_salted(&self) -> bool {
        matches!(self, Self::Salted(_))
    }

    /// The children in which exactly these salts begin, if there may be any.
    #[inline]
    pub(super) fn with_salts(&self, salts: &[SaltFrom]) -> Option<&Children> {
        match self {
            _ if salts.is_empty() => Some(self),
            Self::Salted(salted) => salted.of_salts.get(salts),
            _ => None,
        }
    }

    /// Adds a child in which these salts begin, unless there is one with the same tokens. Returns the salts as they are
    /// stored here.
    pub(super) fn insert_salted<'t>(
        &mut self,
        salts: &[SaltFrom],
        tokens: &'t [u32],
        node: NodeKey,
        tokens_of: impl Fn(NodeKey) -> &'t [u32],
    ) -> Arc<[SaltFrom]> {
        if !self.are_salted() {
            let plain = std::mem::take(self);
            *self = Self::Salted(Box::new(Salted { len: plain.len(), plain, of_salts: BTreeMap::new() }));
        }
        let Self::Salted(salted) = self else { return salts.into() };
        let stored = salted.of_salts.get_key_value(salts).map_or_else(|| salts.into(), |(known, _)| known.clone());
        let children = salted.of_salts.entry(Arc::clone(&stored)).or_default();
        salted.len -= children.len();
        children.insert(tokens, node, tokens_of);
        salted.len += children.len();
        stored
    }

    /// The child with exactly these tokens.
    #[inline(always)]
    pub(super) fn get<'t>(&self, tokens: &[u32], tokens_of: impl Fn(NodeKey) -> &'t [u32]) -> Option<NodeKey> {
        if let Self::Few(children) = self {
            match children.as_slice() {
                [] => return None,
                // Most prefixes do not branch.
                [only] => return (tokens_of(only.node) == tokens).then_some(only.node),
                _ => {}
            }
        }
        self.get_of_several(tokens, tokens_of)
    }

    #[inline(never)]
    fn get_of_several<'t>(&self, tokens: &[u32], tokens_of: impl Fn(NodeKey) -> &'t [u32]) -> Option<NodeKey> {
        match self {
            Self::Few(children) => search(children, tokens, tokens_of).ok().map(|at| children[at].node),
            Self::Many(children) => children.get(tokens).copied(),
            Self::Salted(salted) => salted.plain.get(tokens, tokens_of),
        }
    }

    /// The child with exactly these tokens, or the two next to their position: one search for both.
    #[inline(always)]
    pub(super) fn near<'t>(&self, tokens: &[u32], tokens_of: impl Fn(NodeKey) -> &'t [u32]) -> Near {
        if let Self::Few(children) = self {
            match children.as_slice() {
                [] => return Near::Between([None; 2]),
                // Most prefixes do not branch.
                [only] if tokens_of(only.node) == tokens => return Near::Exact(only.node),
                [only] => return Near::Between([Some(only.node), None]),
                _ => {}
            }
        }
        self.near_several(tokens, tokens_of)
    }

    #[inline(never)]
    fn near_several<'t>(&self, tokens: &[u32], tokens_of: impl Fn(NodeKey) -> &'t [u32]) -> Near {
        match self {
            Self::Few(children) => match search(children, tokens, tokens_of) {
                Ok(at) => Near::Exact(children[at].node),
                Err(at) => Near::Between(around(children, at)),
            },
            Self::Many(children) => {
                let mut below = children.range::<[u32], _>((Bound::Unbounded, Bound::Included(tokens)));
                match below.next_back() {
                    Some((same, node)) if **same == *tokens => Near::Exact(*node),
                    below => {
                        let mut above = children.range::<[u32], _>((Bound::Excluded(tokens), Bound::Unbounded));
                        Near::Between([below, above.next()].map(|child| child.map(|(_, node)| *node)))
                    }
                }
            }
            Self::Salted(salted) => salted.plain.near(tokens, tokens_of),
        }
    }

    /// The two children next to the position where these tokens would be inserted. Because the order is sorted, one of
    /// them has the longest common prefix with the tokens.
    pub(super) fn neighbours<'t>(
        &self,
        tokens: &[u32],
        tokens_of: impl Fn(NodeKey) -> &'t [u32],
    ) -> [Option<NodeKey>; 2] {
        match self {
            Self::Few(children) => {
                let (Ok(at) | Err(at)) = search(children, tokens, tokens_of);
                around(children, at)
            }
            Self::Many(children) => {
                let below = (Bound::Unbounded, Bound::Excluded(tokens));
                let above = (Bound::Included(tokens), Bound::Unbounded);
                let below = children.range::<[u32], _>(below).next_back();
                [below, children.range::<[u32], _>(above).next()].map(|child| child.map(|(_, node)| *node))
            }
            Self::Salted(salted) => salted.plain.neighbours(tokens, tokens_of),
        }
    }

    /// Adds a child, unless there is one with the same tokens.
    pub(super) fn insert<'t>(&mut self, tokens: &'t [u32], node: NodeKey, tokens_of: impl Fn(NodeKey) -> &'t [u32]) {
        match self {
            Self::Few(children) if children.len() < FEW => {
                if let Err(at) = search(children, tokens, tokens_of) {
                    children.insert(at, Child { first: first(tokens), node });
                }
            }
            _ => self.insert_other(tokens, node, tokens_of),
        }
    }

    #[inline(never)]
    fn insert_other<'t>(&mut self, tokens: &'t [u32], node: NodeKey, tokens_of: impl Fn(NodeKey) -> &'t [u32]) {
        match self {
            Self::Few(children) => {
                let known = children.iter().map(|child| (tokens_of(child.node).into(), child.node));
                let mut many: BTreeMap<Box<[u32]>, NodeKey> = known.collect();
                many.insert(tokens.into(), node);
                *self = Self::Many(many);
            }
            Self::Many(children) => {
                children.insert(tokens.into(), node);
            }
            Self::Salted(salted) => {
                salted.len -= salted.plain.len();
                salted.plain.insert(tokens, node, tokens_of);
                salted.len += salted.plain.len();
            }
        }
    }

    /// Removes the child with these tokens, and with the salts that begin in it, if any do: they are asked for only if
    /// there are children with salts.
    pub(super) fn remove<'t>(
        &mut self,
        tokens: &[u32],
        tokens_of: impl Fn(NodeKey) -> &'t [u32],
        salts: impl FnOnce() -> Option<Arc<[SaltFrom]>>,
    ) {
        match self {
            // An only child is removed without comparing its tokens, which are no longer in the processor's caches.
            Self::Few(children) if children.len() == 1 => children.clear(),
            Self::Few(children) => {
                if let Ok(at) = search(children, tokens, tokens_of) {
                    children.remove(at);
                }
            }
            Self::Many(children) => {
                children.remove(tokens);
            }
            Self::Salted(salted) => {
                if let Some(plain) = salted.remove(tokens, tokens_of, salts()) {
                    *self = plain;
                }
            }
        }
    }

    /// All children, in order.
    pub(super) fn nodes(&self) -> Vec<NodeKey> {
        match self {
            Self::Few(children) => children.iter().map(|child| child.node).collect(),
            Self::Many(children) => children.values().copied().collect(),
            Self::Salted(salted) => salted.sets().flat_map(Children::nodes).collect(),
        }
    }

    /// Whether the order, and the copies of tokens kept here, agree with the children.
    pub(super) fn is_consistent<'t>(&self, tokens_of: impl Fn(NodeKey) -> &'t [u32] + Copy) -> bool {
        match self {
            Self::Few(children) => {
                children.is_sorted_by(|a, b| tokens_of(a.node) < tokens_of(b.node))
                    && children.iter().all(|child| child.first == first(tokens_of(child.node)))
            }
            Self::Many(children) => children.iter().all(|(tokens, node)| **tokens == *tokens_of(*node)),
            Self::Salted(salted) => {
                let is_set = |(salts, children): (&Arc<[SaltFrom]>, &Children)| {
                    !salts.is_empty() && !children.is_empty() && !children.are_salted()
                };
                !salted.of_salts.is_empty()
                    && !salted.plain.are_salted()
                    && salted.of_salts.iter().all(is_set)
                    && salted.sets().all(|children| children.is_consistent(tokens_of))
                    && salted.len == salted.sets().map(Children::len).sum::<usize>()
            }
        }
    }
}

impl Salted {
    /// Removes the child with these tokens and salts. If none with salts is left, the others are returned.
    #[inline(never)]
    fn remove<'t>(
        &mut self,
        tokens: &[u32],
        tokens_of: impl Fn(NodeKey) -> &'t [u32],
        salts: Option<Arc<[SaltFrom]>>,
    ) -> Option<Children> {
        let children = match &salts {
            Some(salts) => self.of_salts.get_mut(salts)?,
            None => &mut self.plain,
        };
        self.len -= children.len();
        children.remove(tokens, tokens_of, || None);
        self.len += children.len();
        if let Some(salts) = salts.filter(|_| children.is_empty()) {
            self.of_salts.remove(&salts);
        }
        self.of_salts.is_empty().then(|| std::mem::take(&mut self.plain))
    }

    /// The children in which no salt begins, and those of each list of salts.
    fn sets(&self) -> impl Iterator<Item = &Children> {
        std::iter::once(&self.plain).chain(self.of_salts.values())
    }
}

/// The children at index `at - 1` and `at` of a sorted list.
fn around(children: &[Child], at: usize) -> [Option<NodeKey>; 2] {
    [at.checked_sub(1), Some(at)].map(|at| children.get(at?).map(|child| child.node))
}

/// The index of the child with these tokens, or the index where it would be inserted.
fn search<'t>(children: &[Child], tokens: &[u32], tokens_of: impl Fn(NodeKey) -> &'t [u32]) -> Result<usize, usize> {
    match children {
        [] => Err(0),
        [only] => match tokens_of(only.node).cmp(tokens) {
            std::cmp::Ordering::Equal => Ok(0),
            std::cmp::Ordering::Less => Err(1),
            std::cmp::Ordering::Greater => Err(0),
        },
        children => {
            let first = first(tokens);
            children.binary_search_by(|child| child.first.cmp(&first).then_with(|| tokens_of(child.node).cmp(tokens)))
        }
    }
}

/// The first of a block's tokens. An empty slice sorts before all others, so it gets 0, the smallest token.
fn first(tokens: &[u32]) -> u32 {
    tokens.first().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_children_are_found_like_few() {
        const MANY: u32 = 2 * FEW as u32;
        let tokens: Vec<[u32; 2]> = (0..MANY).map(|i| [i % 7, i * 37 % 10_007]).collect();
        let of = |node: NodeKey| &tokens[node as usize][..];
        let mut children = Children::default();
        for node in 0..MANY {
            children.insert(of(node), node, of);
            let (less, more) = (of(node), [of(node)[0], of(node)[1] + 1]);
            let [below, _] = children.neighbours(&more, of);
            assert_eq!((children.get(less, of), below), (Some(node), Some(node)));
            assert_eq!(children.near(less, of), Near::Exact(node));
            let between = Near::Between(children.neighbours(&more, of));
            assert!(children.get(&more, of).is_some() || children.near(&more, of) == between);
            assert!(node % 100 > 0 || children.is_consistent(of));
        }
        assert!(matches!(children, Children::Many(_)));
        for node in (0..MANY).step_by(2) {
            children.remove(of(node), of, || None);
            assert_eq!(children.get(of(node), of), None);
        }
        let sorted = children.nodes();
        assert!(sorted.len() == FEW && sorted.is_sorted_by_key(|node| of(*node)));
    }

    #[test]
    fn children_with_salts_are_apart_from_the_others() {
        let tokens: Vec<[u32; 1]> = (0..40).map(|i| [i % 5]).collect();
        let of = |node: NodeKey| &tokens[node as usize][..];
        // For each list of salts, five children with the same tokens.
        let salts: Vec<Arc<[SaltFrom]>> = (0..40usize)
            .map(|i| (0..i / 5).map(|position| SaltFrom { position, salt: crate::Salt::new(b"s") }).collect())
            .collect();
        let mut children = Children::default();
        for node in (0..40).rev() {
            match &*salts[node as usize] {
                [] => children.insert(of(node), node, of),
                of_node => drop(children.insert_salted(of_node, of(node), node, of)),
            }
            assert!(children.is_consistent(of));
        }
        let get = |children: &Children, node: NodeKey| children.with_salts(&salts[node as usize])?.get(of(node), of);
        assert!((0..40).all(|node| get(&children, node) == Some(node)));
        assert_eq!((children.len(), children.nodes().len()), (40, 40));
        for node in (0..40).map(|i| i * 7 % 40) {
            let of_node = Some(Arc::clone(&salts[node as usize])).filter(|salts| !salts.is_empty());
            let before = children.len();
            children.remove(of(node), of, || of_node);
            assert_eq!((get(&children, node), children.len()), (None, before - 1));
            assert!(children.is_consistent(of));
        }
        assert!(children.is_empty() && !children.are_salted());
    }
}
