//! Matching prefixes, and caching blocks.

use std::sync::mpsc::Receiver;

use smallvec::SmallVec;

use super::write::cost_of_copy;
use super::{Ledger, MAX_REF_COUNT};
use crate::prefix::{Past, PrefixTree};
use crate::{AlreadyCached, BlockId, KvEvent, PrefixKey, PrefixMatch};

/// A search for the cached blocks that continue a sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Query<'a> {
    /// What must match in addition to the tokens.
    pub(crate) key: &'a PrefixKey,
    /// The number, in the sequence, of the first block to match.
    pub(crate) at: usize,
    /// The block before that one.
    pub(crate) last: Option<BlockId>,
    /// The sequence's tokens from that block on.
    pub(crate) tokens: &'a [u32],
}

impl Ledger {
    /// Uses the cached blocks that continue a sequence: increments their ref_counts and passes them to `matched`.
    /// Returns how many tokens matched. They may end inside the last block.
    pub(crate) fn match_prefix(&mut self, query: Query<'_>, mut matched: impl FnMut(BlockId)) -> usize {
        self.stats.queries += 1;
        self.stats.queried_tokens += query.tokens.len() as u64;
        let Query { key, at, last, tokens } = query;
        let Self { tree, ref_counts, evictable, .. } = self;
        let found = tree.longest(key, at, last, tokens, |id| {
            let ref_count = &mut ref_counts[id.index()];
            if *ref_count == 0 {
                evictable.remove(id);
            }
            *ref_count = MAX_REF_COUNT.min(*ref_count + 1);
            matched(id);
        });
        self.tree.record_use(found);
        self.stats.hit_tokens += found.tokens as u64;
        found.tokens
    }

    /// Looks up what [`match_prefix`](Self::match_prefix) would match, and how many available blocks the sequence would
    /// take to have slots for `slots` tokens from there on.
    pub(crate) fn lookup_prefix(&self, query: Query<'_>, slots: usize) -> PrefixMatch {
        let Query { key, at, last, tokens } = query;
        let (mut in_use, mut evictable, mut of_last) = (0usize, 0usize, 0);
        let found = self.tree.longest(key, at, last, tokens, |id| {
            of_last = self.ref_counts[id.index()];
            *if of_last > 0 { &mut in_use } else { &mut evictable } += 1;
        });
        let tokens = found.tokens;
        let growth = slots.div_ceil(self.block_size).saturating_sub(tokens.div_ceil(self.block_size));
        // Whether the sequence continues inside the last block.
        let inside = !tokens.is_multiple_of(self.block_size) && slots > tokens;
        let copy = if inside { cost_of_copy(of_last) } else { 0 };
        let blocks = evictable.saturating_add(growth).saturating_add(copy);
        PrefixMatch { tokens, in_use, evictable, blocks }
    }

    /// Caches the blocks `ids[at..]` under their tokens, which are `head` followed by `tokens`, as many as are full.
    /// Where a block with the same content is cached already, `ids` gets that one, and the block that it replaces is
    /// returned, still counted as used. Caches nothing if `epoch`, in which the content began to be written, is over.
    /// Fails if the first block is cached already.
    pub(crate) fn cache(
        &mut self,
        epoch: u64,
        key: &PrefixKey,
        ids: &mut [BlockId],
        at: usize,
        head: &[u32],
        tokens: &[u32],
    ) -> Result<SmallVec<[BlockId; 8]>, AlreadyCached> {
        let mut duplicates = SmallVec::new();
        if epoch != self.epoch || head.len() + tokens.len() < self.block_size {
            return Ok(duplicates);
        }
        if self.tree.contains(ids[at]) {
            return Err(AlreadyCached);
        }
        let mut parent_block = at.checked_sub(1).map(|before| ids[before]);
        // Without a parent no search would reach the block.
        let Some(mut parent) = self.tree.start_or_root(key, at, parent_block) else { return Ok(duplicates) };
        let mut head = head;
        let mut rest = tokens;
        for entry in &mut ids[at..] {
            let id = *entry;
            if head.len() + rest.len() < self.block_size || self.tree.contains(id) {
                break;
            }
            let (now, later) = rest.split_at(self.block_size - head.len());
            let own = self.tree.next_tokens();
            own[..head.len()].copy_from_slice(head);
            own[head.len()..].copy_from_slice(now);
            (head, rest) = (&[], later);
            let (node, same) = self.tree.insert(parent, id);
            parent = node;
            match same {
                None => {
                    let tokens = || self.tree.tokens(id).unwrap_or_default().to_vec();
                    let event =
                        || KvEvent::BlockStored { block: id, parent: parent_block, tokens: tokens(), key: key.clone() };
                    self.subscribers.publish(event);
                }
                Some(same) => {
                    self.add_ref(same);
                    *entry = same;
                    duplicates.push(id);
                }
            }
            parent_block = Some(*entry);
        }
        Ok(duplicates)
    }

    /// The tokens of a cached block.
    pub(crate) fn tokens(&self, id: BlockId) -> Option<&[u32]> {
        self.tree.tokens(id)
    }

    /// The key and the tokens of the cached prefix that `ids` begin with.
    pub(crate) fn prefix(&self, ids: &[BlockId]) -> Option<(PrefixKey, Vec<u32>)> {
        let (key, blocks) = self.tree.path(ids)?;
        let tokens = ids[..blocks].iter().filter_map(|&id| self.tree.tokens(id)).flatten().copied().collect();
        Some((key, tokens))
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Uncaches all blocks. Those that were evictable are still to be [freed](Self::free_uncached); until then they can
    /// be allocated. Returns the old tree, for the caller to drop without the lock.
    pub(crate) fn reset(&mut self) -> PrefixTree {
        self.epoch += 1;
        self.subscribers.publish(|| KvEvent::AllBlocksCleared);
        let empty = PrefixTree::new(self.ref_counts.len(), self.block_size);
        std::mem::replace(&mut self.tree, empty)
    }

    /// Frees up to `n` of the blocks that were evictable when the tree was reset. Returns whether there may be more. If
    /// the blocks are to be poisoned first, they are added to `to_poison` instead, with a ref_count of 1, and the
    /// caller frees them.
    pub(crate) fn free_uncached(&mut self, n: usize, to_poison: Option<&mut Vec<BlockId>>) -> bool {
        let mut uncached = Vec::new();
        let list = to_poison.unwrap_or(&mut uncached);
        let before = list.len();
        for _ in 0..n {
            // Their ref_count became 0 before that of all blocks cached since, so they come first.
            let Some(id) = self.evictable.next_victim().filter(|&id| !self.tree.contains(id)) else { break };
            self.add_ref(id);
            list.push(id);
        }
        let more = list.len() - before == n;
        self.free(&uncached);
        more
    }

    /// Adds a subscriber. Returns what is cached now, and the receiver of later events.
    pub(crate) fn subscribe(&mut self) -> (Past, Receiver<KvEvent>) {
        (self.tree.past(), self.subscribers.add())
    }
}
