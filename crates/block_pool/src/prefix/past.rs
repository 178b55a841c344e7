//! The tree as events, for those who begin to listen late.

use std::collections::HashMap;

use super::{NodeKey, PrefixTree};
use crate::{BlockId, PoolEvent, PrefixKey};

/// A copy of the tree, made in one go under the pool's lock; the events are made of it later.
#[derive(Debug)]
pub(crate) struct Past {
    keys: Vec<(NodeKey, PrefixKey)>,
    /// Each node, its parent and its block, in the order of their tokens.
    nodes: Vec<(NodeKey, NodeKey, Option<BlockId>)>,
    tokens: Vec<u32>,
    block_size: usize,
}

impl PrefixTree {
    pub(crate) fn past(&self) -> Past {
        let mut past = Past {
            keys: self.keys.iter().map(|(node, key)| (*node, key.clone())).collect(),
            nodes: Vec::with_capacity(self.nodes.len()),
            tokens: Vec::with_capacity(self.nodes.len() * self.block_size),
            block_size: self.block_size,
        };
        for (key, node) in &self.nodes {
            let key = key as NodeKey;
            if node.parent != key {
                past.nodes.push((key, node.parent, self.block(key)));
                past.tokens.extend_from_slice(self.tokens_of(key));
            }
        }
        past
    }
}

impl Past {
    /// The events that would have built this tree: parents before their children. Tokens whose block is not there any more
    /// come before those of the next block after them that is.
    pub(crate) fn events(self) -> Vec<PoolEvent> {
        let mut children: HashMap<NodeKey, Vec<usize>> = HashMap::new();
        for (at, (_, parent, _)) in self.nodes.iter().enumerate() {
            children.entry(*parent).or_default().push(at);
        }
        let mut events = Vec::with_capacity(self.nodes.len());
        for (root, key) in &self.keys {
            // Nodes whose children are to be told of, the last block before them, and the tokens since.
            let mut open: Vec<(NodeKey, Option<BlockId>, Vec<u32>)> = vec![(*root, None, Vec::new())];
            while let Some((node, parent, mut since)) = open.pop() {
                let children = children.get(&node).map_or(&[][..], Vec::as_slice);
                for (i, &child) in children.iter().enumerate() {
                    let (node, _, block) = self.nodes[child];
                    // Mostly there is one child, and a long way is not copied at each step.
                    let last = i + 1 == children.len();
                    let mut tokens = if last { std::mem::take(&mut since) } else { since.clone() };
                    tokens.extend_from_slice(&self.tokens[child * self.block_size..][..self.block_size]);
                    match block {
                        Some(block) => {
                            events.push(PoolEvent::Stored { block, parent, tokens, key: key.clone() });
                            open.push((node, Some(block), Vec::new()));
                        }
                        None => open.push((node, parent, tokens)),
                    }
                }
            }
        }
        events
    }
}
