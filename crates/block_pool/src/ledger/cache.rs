//! Matching prefixes, and caching blocks.

use smallvec::SmallVec;

use super::counts::Why;
use super::need::{Need, most_units};
use super::write::cost_of_copy;
use super::{Group, Ledger, MAX_REF_COUNT, tree_groups};
use crate::events::Live;
use crate::list::List;
use crate::prefix::{Entry, Past, PrefixTree};
use crate::{AlreadyCached, BlockId, CachedPrefix, GroupBlock, KvEvent, PrefixKey, PrefixMatch, SaltFrom};

/// A search for the cached blocks that continue a sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Query<'a> {
    /// What must match in addition to the tokens.
    pub(crate) key: &'a PrefixKey,
    /// The number, in the sequence, of the first block to match.
    pub(crate) at: usize,
    /// The block before that one, in any group that has it.
    pub(crate) last: Option<GroupBlock>,
    /// The salts of the sequence, in the order of their positions.
    pub(crate) salts: &'a [SaltFrom],
    /// The sequence's tokens from that block on.
    pub(crate) tokens: &'a [u32],
}

/// What the blocks of a sequence from a number on contain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Content<'a> {
    /// What must match in addition to the tokens.
    pub(crate) key: &'a PrefixKey,
    /// The salts of the sequence, in the order of their positions.
    pub(crate) salts: &'a [SaltFrom],
    /// The number, in the sequence, of the first block.
    pub(crate) at: usize,
    /// The sequence's tokens from that block on: these, followed by `tokens`.
    pub(crate) head: &'a [u32],
    pub(crate) tokens: &'a [u32],
}

/// Blocks that were exchanged for cached ones: still counted as used, each with its group.
pub(crate) type Duplicates = SmallVec<[(usize, BlockId); 8]>;

impl Ledger {
    fn last_entry(&self, last: Option<GroupBlock>) -> Option<Entry> {
        last.map(|GroupBlock { group, block }| self.entry(group, block))
    }

    /// Uses the cached blocks that continue a sequence: increments their ref_counts and passes them to `matched`, group
    /// by group. Returns how many tokens matched. They may end inside the last block.
    pub(crate) fn match_prefix(&mut self, query: Query<'_>, mut matched: impl FnMut(usize, BlockId)) -> usize {
        self.stats.queries += 1;
        self.stats.queried_tokens += query.tokens.len() as u64;
        let Query { key, at, last, salts, tokens } = query;
        let last = self.last_entry(last);
        let Self { tree, ref_counts, evictable, groups, .. } = self;
        let (mut units, several) = (0, groups.len() > 1);
        let found = tree.longest(key, at, last, salts, tokens, |group, id| {
            let of = &mut groups[group];
            let entry = of.first + id.index();
            let ref_count = &mut ref_counts[entry];
            if *ref_count == 0 {
                evictable.remove(entry);
                units += of.units;
                if several {
                    of.evictable -= 1;
                }
            }
            *ref_count = MAX_REF_COUNT.min(*ref_count + 1);
            matched(group, id);
        });
        self.units_evictable -= units;
        self.units_in_use += units;
        self.tree.record_use(found);
        self.stats.hit_tokens += found.tokens as u64;
        found.tokens
    }

    /// Looks up what [`match_prefix`](Self::match_prefix) would match, and how many available units the sequence would
    /// take to have slots for `slots` tokens from there on, all at once. With `chunk`, it gets slots for at most this
    /// many tokens at a time, and its windows free blocks in between. `own` are the blocks that it has in each group.
    pub(crate) fn lookup_prefix<'b>(
        &self,
        query: Query<'_>,
        slots: usize,
        chunk: Option<usize>,
        own: impl Fn(usize) -> &'b [BlockId],
    ) -> PrefixMatch {
        let Query { key, at, last, salts, tokens } = query;
        let block_size = self.block_size;
        // Of the blocks of each group that match: how many are in use and evictable, and how many lists use the last one.
        let mut groups: SmallVec<[(usize, usize, u32); 1]> = SmallVec::from_elem((0, 0, 0), self.groups.len());
        let last = self.last_entry(last);
        let matched = match &mut groups[..] {
            // Counted apart, because look-ups walk over long prefixes again and again.
            [(in_use, evictable, of_last)] => self.tree.longest(key, at, last, salts, tokens, |_, id| {
                *of_last = self.ref_counts[id.index()];
                *if *of_last > 0 { &mut *in_use } else { &mut *evictable } += 1;
            }),
            groups => self.tree.longest(key, at, last, salts, tokens, |group, id| {
                let (in_use, evictable, of_last) = &mut groups[group];
                *of_last = self.ref_counts[self.entry(group, id)];
                *if *of_last > 0 { in_use } else { evictable } += 1;
            }),
        };
        let matched = matched.tokens;
        let mut found = PrefixMatch { tokens: matched, ..PrefixMatch::default() };
        // Whether the sequence continues inside the last block.
        let inside = !matched.is_multiple_of(block_size) && slots > matched;
        let (from, to) = (at * block_size + matched, at * block_size + slots);
        let mut needs = SmallVec::<[Need; 2]>::new();
        for (group, (of, (in_use, evictable, of_last))) in self.groups.iter().zip(groups).enumerate() {
            found.in_use += in_use;
            found.evictable += evictable;
            let (span, units) = (of.spec.span.narrowed_by(key.window), of.units);
            let copy = if inside { cost_of_copy(of_last) } else { 0 };
            let is_own = |id: &&BlockId| self.ref_counts[self.entry(group, **id)] == 1;
            let own = if chunk.is_none() || span.is_all() { 0 } else { own(group).iter().filter(is_own).count() };
            needs.push(Need { span, units, evictable, copy, own });
        }
        found.blocks = most_units(&needs, block_size, from..to, from.div_ceil(block_size), chunk);
        found
    }

    /// Caches the blocks of the lists under their content, as many as are full. Where a block with the same content is
    /// cached already, the list gets that one, and the block that it replaces is returned. Caches nothing if `epoch`, in
    /// which the content began to be written, is over. Fails if the first block is cached already.
    pub(crate) fn cache(
        &mut self,
        epoch: u64,
        lists: &mut [List],
        content: Content<'_>,
    ) -> Result<Duplicates, AlreadyCached> {
        match (content.salts, &*lists) {
            // The compiler leaves no loop over a single group, and no search for salts.
            ([], [_]) => self.cache_in::<1, _>(epoch, lists, content, |_| &[]),
            _ => self.cache_in_groups(epoch, lists, content),
        }
    }

    #[inline(never)]
    fn cache_in_groups(
        &mut self,
        epoch: u64,
        lists: &mut [List],
        content: Content<'_>,
    ) -> Result<Duplicates, AlreadyCached> {
        let (salts, block_size) = (content.salts, self.block_size);
        let of_block = |number: usize| SaltFrom::at(salts, number * block_size..(number + 1) * block_size);
        self.cache_in::<0, _>(epoch, lists, content, of_block)
    }

    /// `GROUPS` is the number of lists; 0 is any number. `salts` are those that begin in the block with a number.
    #[inline(always)]
    fn cache_in<'a, const GROUPS: usize, S: Fn(usize) -> &'a [SaltFrom]>(
        &mut self,
        epoch: u64,
        lists: &mut [List],
        Content { key, at, head, tokens, .. }: Content<'a>,
        salts: S,
    ) -> Result<Duplicates, AlreadyCached> {
        let lists = if GROUPS > 0 { &mut lists[..GROUPS] } else { lists };
        let mut duplicates = SmallVec::new();
        if epoch != self.epoch || head.len() + tokens.len() < self.block_size {
            return Ok(duplicates);
        }
        // A division for each group, unless it has no sink tokens.
        let sink_blocks = |of: &Group| match of.spec.span.narrowed_by(key.window) {
            span if span.sink_tokens() == 0 => 0,
            span => span.sink_blocks(self.block_size),
        };
        let sinks: SmallVec<[usize; 4]> = self.groups.iter().map(sink_blocks).collect();
        let sinks = &sinks[..lists.len()];
        let is_cached = |(group, list): (usize, &List)| {
            list.block(at, sinks[group]).is_some_and(|block| self.tree.contains(self.entry(group, block)))
        };
        if lists.iter().enumerate().any(is_cached) {
            return Err(AlreadyCached);
        }
        // Groups whose window has passed the block before, or which have replaced it, do not know it.
        let mut parent_block = at.checked_sub(1).and_then(|before| {
            lists.iter().enumerate().find_map(|(group, list)| {
                let block = list.block(before, sinks[group])?;
                self.tree.contains(self.entry(group, block)).then_some(GroupBlock { group, block })
            })
        });
        // Without a parent no search would reach the block.
        let last = self.last_entry(parent_block);
        let Some(mut parent) = self.tree.start_or_root(key, at, last) else { return Ok(duplicates) };
        let mut head = head;
        let mut rest = tokens;
        let end = lists.iter().map(List::end).max().unwrap_or(0);
        for number in at..end {
            let is_cached = |(group, list): (usize, &List)| {
                list.block(number, sinks[group]).is_some_and(|block| self.tree.contains(self.entry(group, block)))
            };
            if head.len() + rest.len() < self.block_size || lists.iter().enumerate().any(is_cached) {
                break;
            }
            let (now, later) = rest.split_at(self.block_size - head.len());
            let own = self.tree.next_tokens();
            own[..head.len()].copy_from_slice(head);
            own[head.len()..].copy_from_slice(now);
            (head, rest) = (&[], later);
            let salts = salts(number);
            let node = match salts {
                [] => self.tree.insert(parent),
                salts => self.tree.insert_salted(parent, salts),
            };
            let before = std::mem::take(&mut parent_block);
            for (group, list) in lists.iter_mut().enumerate() {
                let Some(index) = list.index_of(number, sinks[group]) else { continue };
                let block = list.ids[index];
                match self.tree.set_block(node, group, block) {
                    None => {
                        let tree = &self.tree;
                        self.subscribers.publish(|| {
                            let (tokens, key) = (tree.tokens_of(node.0).to_vec(), key.clone());
                            KvEvent::BlockStored { group, block, parent: before, tokens, key, salts: salts.to_vec() }
                        });
                        if self.offload.is_some() {
                            self.write_through(group, block);
                        }
                    }
                    Some(same) => {
                        self.add_ref(group, self.entry(group, same));
                        list.ids[index] = same;
                        duplicates.push((group, block));
                    }
                }
                parent_block = parent_block.or(Some(GroupBlock { group, block: list.ids[index] }));
            }
            parent = node.0;
        }
        // Nodes whose blocks windows have passed already.
        if self.tree.has_too_many_tombstones() {
            self.drop_cold_prefixes();
        }
        Ok(duplicates)
    }

    /// The tokens of a cached block.
    pub(crate) fn tokens(&self, group: usize, id: BlockId) -> Option<&[u32]> {
        self.tree.tokens(self.entry(group, id))
    }

    /// Whether a block is cached at the end of these tokens, whole blocks, of a sequence with this key and these salts.
    pub(crate) fn is_at_end_of(&self, of: GroupBlock, key: &PrefixKey, tokens: &[u32], salts: &[SaltFrom]) -> bool {
        let size = self.block_size;
        let of_block = |number: usize| SaltFrom::at(salts, number * size..(number + 1) * size);
        self.tree.is_at_end_of(self.entry(of.group, of.block), key, tokens, of_block)
    }

    /// The cached prefix that a group's blocks begin with.
    pub(crate) fn prefix(&self, group: usize, ids: &[BlockId]) -> Option<CachedPrefix> {
        let entries: Vec<Entry> = ids.iter().map(|&id| self.entry(group, id)).collect();
        let (key, blocks) = self.tree.path(&entries)?;
        let entries = &entries[..blocks];
        let tokens = entries.iter().filter_map(|&entry| self.tree.tokens(entry)).flatten().copied().collect();
        let salts = entries.iter().flat_map(|&entry| self.tree.salts(entry)).cloned().collect();
        Some(CachedPrefix { key, salts, tokens })
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Uncaches all blocks. Those that were evictable are still to be [freed](Self::free_uncached); until then they can
    /// be allocated. Returns the old tree, for the caller to drop without the lock.
    pub(crate) fn reset(&mut self) -> PrefixTree {
        self.epoch += 1;
        self.subscribers.publish(|| KvEvent::AllBlocksCleared);
        let mut empty = PrefixTree::new(self.ref_counts.len(), tree_groups(&self.groups), self.block_size);
        if self.offload.is_some() {
            empty.keep_lineages();
        }
        std::mem::replace(&mut self.tree, empty)
    }

    /// Frees up to `n` of the blocks that were evictable when the tree was reset. Returns whether there may be more. If
    /// the blocks are to be poisoned first, they are added to `to_poison` instead, with a ref_count of 1, and the
    /// caller frees them.
    pub(crate) fn free_uncached(&mut self, n: usize, to_poison: Option<&mut Vec<(usize, BlockId)>>) -> bool {
        let mut uncached = Vec::new();
        let list = to_poison.unwrap_or(&mut uncached);
        let before = list.len();
        for _ in 0..n {
            // In each of the two orders of eviction, their ref_count became 0 before that of all blocks cached since, so
            // they come first.
            let is_left = |entry: &Entry| !self.tree.contains(*entry);
            let oldest = [self.evictable.next_victim(), self.evictable.oldest_used()];
            let Some(entry) = oldest.into_iter().flatten().find(is_left) else { break };
            let (group, id) = self.block(entry);
            self.add_ref(group, entry);
            list.push((group, id));
        }
        let more = list.len() - before == n;
        uncached.into_iter().for_each(|(group, id)| self.free(group, &[id], Why::Ended));
        more
    }

    /// Adds a subscriber for which at most `most` events wait. Returns what is cached now, and the receiver of later
    /// events.
    pub(crate) fn subscribe(&mut self, most: usize) -> (Past, Live) {
        (self.tree.past(), self.subscribers.add(most))
    }
}
