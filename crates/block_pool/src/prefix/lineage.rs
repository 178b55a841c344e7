//! What a block contains, known without the tree: for blocks that leave the pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{NodeKey, PrefixTree};
use crate::prefix::Entry;
use crate::{PrefixKey, SaltFrom};

/// The tokens of a node, and its path from the root. It outlives the node.
#[derive(Debug)]
pub(crate) struct Lineage {
    before: Before,
    pub(crate) tokens: Box<[u32]>,
    /// Those that begin in the block.
    pub(crate) salts: Arc<[SaltFrom]>,
    /// How many blocks the node has lost. While this does not change, a block that the node has keeps its content.
    removed: AtomicU32,
    /// A bit for each of the first groups: whether a tier has got the block.
    stored: AtomicU64,
}

/// What comes before a block.
#[derive(Debug)]
enum Before {
    Nothing(PrefixKey),
    Block(Arc<Lineage>),
}

impl Lineage {
    /// The key, and the lineages from that of the first block to this one.
    pub(crate) fn path(self: &Arc<Self>) -> (&PrefixKey, Vec<&Arc<Self>>) {
        let mut path = vec![self];
        let mut first = self;
        let key = loop {
            match &first.before {
                Before::Nothing(key) => break key,
                Before::Block(before) => first = before,
            }
            path.push(first);
        };
        path.reverse();
        (key, path)
    }

    /// Whether this is the block directly after `other`.
    pub(crate) fn follows(&self, other: &Arc<Self>) -> bool {
        matches!(&self.before, Before::Block(before) if Arc::ptr_eq(before, other))
    }

    pub(crate) fn removed(&self) -> u32 {
        self.removed.load(Ordering::Relaxed)
    }

    pub(crate) fn is_stored(&self, group: usize) -> bool {
        self.stored.load(Ordering::Relaxed) & bit(group) != 0
    }

    pub(crate) fn set_stored(&self, group: usize) {
        self.stored.fetch_or(bit(group), Ordering::Relaxed);
    }
}

/// Groups beyond the 64th have no bit: their blocks are taken to be new each time.
fn bit(group: usize) -> u64 {
    u32::try_from(group).ok().and_then(|group| 1u64.checked_shl(group)).unwrap_or(0)
}

/// Without recursion, which could be as deep as a sequence has blocks.
impl Drop for Lineage {
    fn drop(&mut self) {
        let take = |before: &mut Before| std::mem::replace(before, Before::Nothing(PrefixKey::new()));
        let mut before = take(&mut self.before);
        while let Before::Block(lineage) = before {
            let Some(mut last) = Arc::into_inner(lineage) else { return };
            before = take(&mut last.before);
        }
    }
}

impl PrefixTree {
    /// From now on, each new node has a lineage, unless its parent has none.
    pub(crate) fn keep_lineages(&mut self) {
        self.lineages.get_or_insert_default();
    }

    /// Gives the lineages back, for the caller to drop without the lock.
    pub(crate) fn take_lineages(&mut self) -> Option<Vec<Option<Arc<Lineage>>>> {
        self.lineages.take()
    }

    /// The lineage of a cached block.
    pub(crate) fn lineage(&self, entry: Entry) -> Option<&Arc<Lineage>> {
        self.lineage_of(self.node(entry)?)
    }

    /// The lineage of the leaf that is dropped next.
    pub(crate) fn lineage_of_coldest(&self) -> Option<&Arc<Lineage>> {
        self.lineage_of(self.leaves.coldest()?)
    }

    fn lineage_of(&self, node: NodeKey) -> Option<&Arc<Lineage>> {
        self.lineages.as_ref()?.get(node as usize)?.as_ref()
    }

    /// Notes that a node loses a block.
    #[inline]
    pub(super) fn count_removed(&self, node: NodeKey) {
        if self.lineages.is_some()
            && let Some(lineage) = self.lineage_of(node)
        {
            lineage.removed.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[cold]
    pub(super) fn add_lineage(&mut self, parent: NodeKey, node: NodeKey) {
        let before = match self.keys.get(&parent) {
            Some(key) => Before::Nothing(key.clone()),
            None => match self.lineage_of(parent) {
                Some(lineage) => Before::Block(lineage.clone()),
                None => return,
            },
        };
        let lineage = Lineage {
            before,
            tokens: self.tokens_of(node).into(),
            salts: self.salts.get(&node).cloned().unwrap_or_default(),
            removed: AtomicU32::new(0),
            stored: AtomicU64::new(0),
        };
        if let Some(lineages) = &mut self.lineages {
            if lineages.len() <= node as usize {
                lineages.resize_with(node as usize + 1, || None);
            }
            lineages[node as usize] = Some(Arc::new(lineage));
        }
    }

    #[inline]
    pub(super) fn remove_lineage(&mut self, node: NodeKey) {
        if let Some(lineage) = self.lineages.as_mut().and_then(|lineages| lineages.get_mut(node as usize)) {
            *lineage = None;
        }
    }
}
