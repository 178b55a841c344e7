//! The tree as events, for new subscribers.

use std::collections::HashMap;
use std::sync::Arc;

use smallvec::SmallVec;

use super::{NodeKey, PrefixTree};
use crate::{BlockId, GroupBlock, KvEvent, PrefixKey, SaltFrom};

/// A copy of the tree. It is made in one pass under the pool's lock, and converted to events later without the lock.
#[derive(Debug)]
pub(crate) struct Past {
    keys: Vec<(NodeKey, PrefixKey)>,
    /// The salts that begin in the block of a node.
    salts: HashMap<NodeKey, Arc<[SaltFrom]>>,
    /// Each node, its parent and its blocks, in the same order as `tokens`.
    nodes: Vec<(NodeKey, NodeKey, Blocks)>,
    tokens: Vec<u32>,
    block_size: usize,
}

/// The blocks of a node, each with its group.
type Blocks = SmallVec<[(usize, BlockId); 1]>;

/// The tokens of consecutive nodes, and the salts that begin in their blocks.
type Since = (Vec<u32>, Vec<SaltFrom>);

impl PrefixTree {
    pub(crate) fn past(&self) -> Past {
        let mut past = Past {
            keys: self.keys.iter().map(|(node, key)| (*node, key.clone())).collect(),
            salts: self.salts.clone(),
            nodes: Vec::with_capacity(self.nodes.len()),
            tokens: Vec::with_capacity(self.nodes.len() * self.block_size),
            block_size: self.block_size,
        };
        for (key, node) in &self.nodes {
            let key = key as NodeKey;
            if node.parent != key {
                past.nodes.push((key, node.parent, self.blocks(key).collect()));
                past.tokens.extend_from_slice(self.tokens_of(key));
            }
        }
        past
    }
}

impl Past {
    /// The events that would have built this tree: parents before their children. The tokens and salts of tombstones are
    /// put before those of the next cached block below them.
    pub(crate) fn events(self) -> Vec<KvEvent> {
        let mut children: HashMap<NodeKey, Vec<usize>> = HashMap::new();
        for (at, (_, parent, _)) in self.nodes.iter().enumerate() {
            children.entry(*parent).or_default().push(at);
        }
        let mut events = Vec::with_capacity(self.nodes.len());
        for (root, key) in &self.keys {
            // The nodes whose children are still to be reported, the last cached block up to there, and the tokens and
            // the salts after it.
            let mut open: Vec<(NodeKey, Option<GroupBlock>, Since)> = vec![(*root, None, Since::default())];
            while let Some((node, parent, mut since)) = open.pop() {
                let children = children.get(&node).map_or(&[][..], Vec::as_slice);
                for (i, &child) in children.iter().enumerate() {
                    let (node, _, blocks) = &self.nodes[child];
                    // Usually there is one child. Then the tokens are moved, so that a long chain is not copied at each
                    // step.
                    let last = i + 1 == children.len();
                    let (mut tokens, mut salts) = if last { std::mem::take(&mut since) } else { since.clone() };
                    tokens.extend_from_slice(&self.tokens[child * self.block_size..][..self.block_size]);
                    salts.extend(self.salts.get(node).into_iter().flat_map(|of_node| of_node.iter().cloned()));
                    for &(group, block) in blocks {
                        let (tokens, key, salts) = (tokens.clone(), key.clone(), salts.clone());
                        events.push(KvEvent::BlockStored { block, group, parent, tokens, key, salts });
                    }
                    match blocks.first() {
                        Some(&(group, block)) => {
                            open.push((*node, Some(GroupBlock { group, block }), Since::default()))
                        }
                        None => open.push((*node, parent, (tokens, salts))),
                    }
                }
            }
        }
        events
    }
}
