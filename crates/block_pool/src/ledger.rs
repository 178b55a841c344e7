//! Who holds what: the free blocks, the number of holders of each, and which can be found by their tokens, under one
//! lock.
//!
//! They live together so that "nobody holds it" and "it is free" are one instant: no thread ever sees a block that is
//! neither held, nor remembered, nor free.
//!
//! | | holders | stored in the tree |
//! |---|---|---|
//! | free | 0 | no |
//! | remembered | 0 | yes |
//! | held | 1 or more | maybe |

use std::ops::Range;
use std::sync::mpsc::Receiver;

use smallvec::SmallVec;

use crate::events::Listeners;
use crate::eviction::Remembered;
use crate::free::{FreeBlocks, Pending};
use crate::prefix::PrefixTree;
use crate::snapshot::BlockState;
use crate::{BlockId, Found, Inconsistent, OutOfBlocks, PoolEvent, Salt, Stats};

#[derive(Debug)]
pub(crate) struct Ledger {
    free: FreeBlocks,
    /// How many owners each block has.
    holders: Vec<u32>,
    tree: PrefixTree,
    remembered: Remembered,
    listeners: Listeners,
    stats: Stats,
    /// How often everything was forgotten. What was computed before is not stored after.
    epoch: u64,
    block_size: usize,
}

/// What became of a request for a block that may be written and for more behind it.
pub(crate) enum Owned {
    /// The block is the caller's own.
    InPlace,
    /// Others read the block: the first of the taken blocks is to become its copy.
    Copy,
}

impl Ledger {
    pub(crate) fn new(blocks: usize, block_size: usize) -> Self {
        Self {
            free: FreeBlocks::all(blocks),
            holders: vec![0; blocks],
            tree: PrefixTree::new(blocks, block_size),
            remembered: Remembered::none(blocks),
            listeners: Listeners::default(),
            stats: Stats::default(),
            epoch: 0,
            block_size,
        }
    }

    /// How many blocks a request can get: the free ones, and the remembered ones, which give way.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.remembered.len()
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn remembered(&self) -> usize {
        self.remembered.len()
    }

    pub(crate) fn stats(&self) -> Stats {
        self.stats
    }

    /// Takes `n` blocks, free ones first, side by side where possible and right behind `after`; all or none. Hands them to
    /// `taken` in runs of neighbours, and returns how many of them, the last ones, were remembered until now.
    #[inline]
    pub(crate) fn take(
        &mut self,
        n: usize,
        after: Option<BlockId>,
        mut taken: impl FnMut(Range<usize>),
    ) -> Result<usize, OutOfBlocks> {
        let available = self.available();
        if n > available {
            return Err(OutOfBlocks { requested: n, available });
        }
        let free = n.min(self.free.len());
        let holders = &mut self.holders;
        self.free.take(free, after, |run| {
            holders[run.clone()].fill(1);
            taken(run);
        });
        for _ in free..n {
            let Some(id) = self.evict() else { break };
            self.holders[id.index()] = 1;
            taken(id.index()..id.index() + 1);
        }
        Ok(n - free)
    }

    /// Forgets the remembered block that is next to give way, or the last leaf below it: a parent never goes before its
    /// child, without which it could not be found.
    fn evict(&mut self) -> Option<BlockId> {
        let first = self.remembered.next_victim()?;
        let victim = loop {
            let leaf = self.leaf_below(first);
            let held = self.holders[leaf.index()] > 0;
            self.forget(leaf);
            // Only a sequence whose window has moved on holds a leaf and not its ancestors.
            if !held {
                break leaf;
            }
        };
        self.remembered.remove(victim);
        self.stats.evictions += 1;
        Some(victim)
    }

    fn leaf_below(&self, id: BlockId) -> BlockId {
        let mut leaf = id;
        while let Some(child) = self.tree.last_child(leaf) {
            leaf = child;
        }
        leaf
    }

    /// A leaf cannot be found any more.
    fn forget(&mut self, leaf: BlockId) {
        self.tree.remove(leaf);
        self.listeners.tell(|| PoolEvent::Removed { block: leaf });
    }

    /// Makes sure that the caller, who holds `block`, may write to it, and takes `n` more.
    #[inline]
    pub(crate) fn own(
        &mut self,
        block: BlockId,
        n: usize,
        last: Option<BlockId>,
        taken: impl FnMut(Range<usize>),
    ) -> Result<(Owned, usize), OutOfBlocks> {
        let alone = self.holders[block.index()] == 1;
        if alone && !self.tree.contains(block) {
            if n == 0 {
                return Ok((Owned::InPlace, 0));
            }
            return Ok((Owned::InPlace, self.take(n, last, taken)?));
        }
        let with_copy = n.saturating_add(1);
        if alone && with_copy > self.available() {
            // What is kept only for those who might come gives way to those who are here.
            let evicted = self.take(n, last, taken)?;
            while self.tree.contains(block) {
                self.forget(self.leaf_below(block));
            }
            return Ok((Owned::InPlace, evicted));
        }
        Ok((Owned::Copy, self.take(with_copy, None, taken)?))
    }

    pub(crate) fn count_copy(&mut self) {
        self.stats.copies += 1;
    }

    pub(crate) fn share(&mut self, ids: &[BlockId]) {
        for id in ids {
            self.holders[id.index()] += 1;
        }
    }

    /// One holder less for each block, from the last to the first: the tail of a sequence is forgotten before its head.
    #[inline]
    pub(crate) fn release(&mut self, ids: &[BlockId]) {
        let mut pending = Pending::default();
        for &id in ids.iter().rev() {
            let holders = &mut self.holders[id.index()];
            *holders -= 1;
            if *holders > 0 {
                continue;
            }
            if self.tree.contains(id) {
                self.remembered.insert(id);
            } else {
                self.free.insert_with(&mut pending, id);
            }
        }
        self.free.finish(pending);
    }

    /// Like [`release`](Self::release), but those that would become free are returned instead, still held.
    pub(crate) fn release_but_free(&mut self, ids: &[BlockId]) -> Vec<BlockId> {
        let mut still_held = Vec::new();
        for id in ids.iter().rev() {
            if self.holders[id.index()] == 1 && !self.tree.contains(*id) {
                still_held.push(*id);
            } else {
                self.release(&[*id]);
            }
        }
        still_held
    }

    /// Holds the stored blocks that continue a prefix behind `last` with `tokens`, and says how many tokens they hold.
    /// The last of them may hold only a part.
    pub(crate) fn reuse(
        &mut self,
        salt: &Salt,
        last: Option<BlockId>,
        tokens: &[u32],
        mut held: impl FnMut(BlockId),
    ) -> usize {
        self.stats.queries += 1;
        self.stats.queried_tokens += tokens.len() as u64;
        let Some(mut node) = self.tree.node(salt, last) else {
            return 0;
        };
        let mut found = 0;
        for block in tokens.chunks_exact(self.block_size) {
            let Some((child, id)) = self.tree.child(node, block) else { break };
            self.hold(id);
            held(id);
            found += self.block_size;
            node = child;
        }
        if let Some((id, part)) = self.tree.nearest_child(node, &tokens[found..]) {
            self.hold(id);
            held(id);
            found += part;
        }
        self.stats.hit_tokens += found as u64;
        found
    }

    /// What [`reuse`](Self::reuse) would find, in whole blocks: those that somebody holds, and those that are remembered.
    pub(crate) fn find(&self, salt: &Salt, tokens: &[u32]) -> Found {
        let mut found = Found::default();
        let Some(mut node) = self.tree.node(salt, None) else { return found };
        for block in tokens.chunks_exact(self.block_size) {
            let Some((child, id)) = self.tree.child(node, block) else { break };
            if self.holders[id.index()] > 0 {
                found.held += 1;
            } else {
                found.remembered += 1;
            }
            node = child;
        }
        found
    }

    /// One holder more for a stored block.
    #[inline]
    fn hold(&mut self, id: BlockId) {
        let holders = &mut self.holders[id.index()];
        if *holders == 0 {
            self.remembered.remove(id);
        }
        *holders += 1;
    }

    /// Makes `ids[at..]` findable, whose tokens are `head` followed by `tokens`, as many as fill whole blocks. Where a
    /// block with the same content is stored already, `ids` gets that one, and the own one is returned, still held.
    /// Stores nothing if `epoch`, in which the content began to be written, is over.
    pub(crate) fn store(
        &mut self,
        epoch: u64,
        salt: &Salt,
        ids: &mut [BlockId],
        at: usize,
        head: &[u32],
        tokens: &[u32],
    ) -> SmallVec<[BlockId; 8]> {
        let mut duplicates = SmallVec::new();
        let first_is_full = head.len() + tokens.len() >= self.block_size;
        if epoch != self.epoch || !first_is_full || self.tree.contains(ids[at]) {
            return duplicates;
        }
        let mut parent = match at.checked_sub(1) {
            None => self.tree.root(salt),
            // Forgotten: then nobody could find what comes behind it.
            Some(before) => match self.tree.node(salt, Some(ids[before])) {
                Some(node) => node,
                None => return duplicates,
            },
        };
        let mut parent_block = at.checked_sub(1).map(|before| ids[before]);
        let mut head = head;
        let mut rest = tokens;
        for place in &mut ids[at..] {
            let id = *place;
            if head.len() + rest.len() < self.block_size || self.tree.contains(id) {
                break;
            }
            let (now, later) = rest.split_at(self.block_size - head.len());
            let stored = self.tree.tokens_mut(id);
            stored[..head.len()].copy_from_slice(head);
            stored[head.len()..].copy_from_slice(now);
            (head, rest) = (&[], later);
            parent = match self.tree.insert(parent, id) {
                Ok(node) => {
                    let tree = &self.tree;
                    self.listeners.tell(|| PoolEvent::Stored {
                        block: id,
                        parent: parent_block,
                        tokens: tree.tokens(id).to_vec(),
                        salt: salt.clone(),
                    });
                    node
                }
                Err((node, same)) => {
                    self.hold(same);
                    *place = same;
                    duplicates.push(id);
                    node
                }
            };
            parent_block = Some(*place);
        }
        duplicates
    }

    /// The tokens of a block that can be found.
    pub(crate) fn tokens(&self, id: BlockId) -> Option<&[u32]> {
        self.tree.contains(id).then(|| self.tree.tokens(id))
    }

    /// The salt and the tokens of the stored prefix that `ids` begin with.
    pub(crate) fn prefix(&self, ids: &[BlockId]) -> Option<(Salt, Vec<u32>)> {
        let (salt, blocks) = self.tree.path(ids)?;
        let tokens = ids[..blocks].iter().flat_map(|&id| self.tree.tokens(id)).copied().collect();
        Some((salt, tokens))
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Forgets every prefix. The blocks that were only remembered are returned, held by the caller.
    pub(crate) fn reset(&mut self) -> Vec<BlockId> {
        self.epoch += 1;
        self.tree.clear();
        let freed: Vec<BlockId> = self.remembered.iter().collect();
        for &id in &freed {
            self.hold(id);
        }
        self.listeners.tell(|| PoolEvent::Cleared);
        freed
    }

    pub(crate) fn listen(&mut self) -> Receiver<PoolEvent> {
        self.listeners.add(self.tree.events())
    }

    pub(crate) fn states(&self) -> impl Iterator<Item = BlockState> + '_ {
        self.holders.iter().enumerate().map(|(index, &holders)| match holders {
            0 if self.tree.contains(BlockId::new(index)) => BlockState::Remembered,
            0 => BlockState::Free,
            n => BlockState::Held(n),
        })
    }

    pub(crate) fn check(&self) -> Result<(), Inconsistent> {
        if !self.free.is_consistent() {
            return Err(Inconsistent("the summaries of the free blocks are wrong".into()));
        }
        if let Some(wrong) = self.tree.inconsistency() {
            return Err(Inconsistent(wrong));
        }
        let mut remembered = vec![false; self.holders.len()];
        for id in self.remembered.iter().take(self.holders.len() + 1) {
            if std::mem::replace(&mut remembered[id.index()], true) {
                return Err(Inconsistent(format!("{id:?} is remembered twice")));
            }
        }
        if remembered.iter().filter(|&&is| is).count() != self.remembered.len() {
            return Err(Inconsistent("the number of remembered blocks is wrong".into()));
        }
        for (index, &holders) in self.holders.iter().enumerate() {
            let id = BlockId::new(index);
            let (free, stored) = (self.free.contains(id), self.tree.contains(id));
            if (free, remembered[index]) != (holders == 0 && !stored, holders == 0 && stored) {
                return Err(Inconsistent(format!(
                    "{id:?} has {holders} holders; free: {free}, remembered: {}, stored: {stored}",
                    remembered[index]
                )));
            }
        }
        Ok(())
    }

    pub(crate) fn check_held<'a>(&self, lists: impl Iterator<Item = &'a [BlockId]>) -> Result<(), Inconsistent> {
        self.check()?;
        let mut counted = vec![0u32; self.holders.len()];
        for id in lists.flatten() {
            match counted.get_mut(id.index()) {
                Some(count) => *count += 1,
                None => return Err(Inconsistent(format!("{id:?} is not of this pool"))),
            }
        }
        for (index, (&holders, &counted)) in self.holders.iter().zip(&counted).enumerate() {
            if holders != counted {
                let id = BlockId::new(index);
                return Err(Inconsistent(format!("{id:?} counts {holders} holders, {counted} hold it")));
            }
        }
        Ok(())
    }
}
