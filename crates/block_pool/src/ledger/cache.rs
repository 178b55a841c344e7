//! Finding blocks by their tokens, and making them findable.

use std::sync::mpsc::Receiver;

use smallvec::SmallVec;

use super::write::cost_of_copy;
use super::{Ledger, MOST_HOLDERS};
use crate::prefix::{Past, PrefixTree};
use crate::{BlockId, Found, PoolEvent, PrefixKey};

/// A sequence's blocks as far as they matter to what is sought after them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sought<'a> {
    /// What must match beside the tokens.
    pub(crate) key: &'a PrefixKey,
    /// The number, in the sequence, of the first block that is sought.
    pub(crate) at: usize,
    /// The block before that one.
    pub(crate) last: Option<BlockId>,
    /// The sequence's tokens from there on.
    pub(crate) tokens: &'a [u32],
}

impl Ledger {
    /// Holds the cached blocks that continue a sequence, hands them to `held`, and says how many tokens it has gained. The last
    /// block may hold only a part of its tokens.
    pub(crate) fn reuse(&mut self, sought: Sought<'_>, mut held: impl FnMut(BlockId)) -> usize {
        self.stats.queries += 1;
        self.stats.queried_tokens += sought.tokens.len() as u64;
        let Sought { key, at, last, tokens } = sought;
        let Self { tree, holders, remembered, .. } = self;
        let found = tree.longest(key, at, last, tokens, |id| {
            let holders = &mut holders[id.index()];
            if *holders == 0 {
                remembered.remove(id);
            }
            *holders = MOST_HOLDERS.min(*holders + 1);
            held(id);
        });
        self.tree.count_use(found);
        self.stats.hit_tokens += found.tokens as u64;
        found.tokens
    }

    /// What [`reuse`](Self::reuse) would find, and what the sequence would take of the pool to have slots for `slots` tokens
    /// from there on.
    pub(crate) fn find(&self, sought: Sought<'_>, slots: usize) -> Found {
        let Sought { key, at, last, tokens } = sought;
        let (mut held, mut remembered, mut of_last) = (0usize, 0usize, 0);
        let found = self.tree.longest(key, at, last, tokens, |id| {
            of_last = self.holders[id.index()];
            *if of_last > 0 { &mut held } else { &mut remembered } += 1;
        });
        let tokens = found.tokens;
        let growth = slots.div_ceil(self.block_size).saturating_sub(tokens.div_ceil(self.block_size));
        // The sequence goes on inside the last block.
        let inside = !tokens.is_multiple_of(self.block_size) && slots > tokens;
        let copy = if inside { cost_of_copy(of_last) } else { 0 };
        let blocks = remembered.saturating_add(growth).saturating_add(copy);
        Found { tokens, held, remembered, blocks }
    }

    /// Makes `ids[at..]` findable, whose tokens are `head` followed by `tokens`, as many as fill whole blocks. Where a
    /// block with the same content is cached already, `ids` gets that one, and the own one is returned, still held.
    /// Caches nothing if `epoch`, in which the content began to be written, is over. `None` if the first block is cached
    /// already.
    pub(crate) fn store(
        &mut self,
        epoch: u64,
        key: &PrefixKey,
        ids: &mut [BlockId],
        at: usize,
        head: &[u32],
        tokens: &[u32],
    ) -> Option<SmallVec<[BlockId; 8]>> {
        let mut duplicates = SmallVec::new();
        if epoch != self.epoch || head.len() + tokens.len() < self.block_size {
            return Some(duplicates);
        }
        if self.tree.contains(ids[at]) {
            return None;
        }
        let mut parent_block = at.checked_sub(1).map(|before| ids[before]);
        // Without a parent nobody could find what comes after it.
        let Some(mut parent) = self.tree.start_or_root(key, at, parent_block) else { return Some(duplicates) };
        let mut head = head;
        let mut rest = tokens;
        for place in &mut ids[at..] {
            let id = *place;
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
                        || PoolEvent::Stored { block: id, parent: parent_block, tokens: tokens(), key: key.clone() };
                    self.listeners.tell(event);
                }
                Some(same) => {
                    self.hold(same);
                    *place = same;
                    duplicates.push(id);
                }
            }
            parent_block = Some(*place);
        }
        Some(duplicates)
    }

    /// The tokens of a block that can be found.
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

    /// From now on nothing that was cached is found. The blocks that were only remembered are still to be
    /// [freed](Self::free_forgotten): meanwhile they can be taken. The old tree is returned to be dropped without the lock.
    pub(crate) fn forget_all(&mut self) -> PrefixTree {
        self.epoch += 1;
        self.listeners.tell(|| PoolEvent::Cleared);
        let empty = PrefixTree::new(self.holders.len(), self.block_size);
        std::mem::replace(&mut self.tree, empty)
    }

    /// Frees up to `n` of the blocks that were remembered until everything was forgotten; says whether there may be more.
    /// Where they are to be overwritten first they are added to `held` instead, held by the caller.
    pub(crate) fn free_forgotten(&mut self, n: usize, held: Option<&mut Vec<BlockId>>) -> bool {
        let mut forgotten = Vec::new();
        let list = held.unwrap_or(&mut forgotten);
        let before = list.len();
        for _ in 0..n {
            // They were let go before all that was cached since.
            let Some(id) = self.remembered.next_victim().filter(|&id| !self.tree.contains(id)) else { break };
            self.hold(id);
            list.push(id);
        }
        let more = list.len() - before == n;
        self.release(&forgotten);
        more
    }

    /// A new listener, and what it has to know to begin with.
    pub(crate) fn listen(&mut self) -> (Past, Receiver<PoolEvent>) {
        (self.tree.past(), self.listeners.add())
    }
}
