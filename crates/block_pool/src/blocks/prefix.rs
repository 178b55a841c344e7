//! Matching cached blocks, caching blocks, and what they depend on in addition to their tokens.

use std::ops::Range;

use smallvec::SmallVec;

use super::{Blocks, More};
use crate::ledger::{Content, Query, Why};
use crate::list::List;
use crate::{AlreadyCached, GroupBlock, PrefixKey, PrefixMatch, Salt, SaltFrom};

impl Blocks {
    /// The salts of the sequence that hold from a position on, in the order of their positions.
    #[inline]
    pub fn salts(&self) -> &[SaltFrom] {
        self.more.as_ref().map_or(&[], |more| &more.salts)
    }

    /// From `position` on the sequence depends on `salt`, in addition to its tokens and key: the block that contains
    /// the position, and all after it, are cached under the salt and match only sequences with the same salts from the same
    /// positions on. In a block in which a salt begins, even the tokens before it match only those. Salts are compared
    /// byte for byte. ([`Salt::none`] changes nothing. vLLM: extra keys.)
    ///
    /// None of the tokens from `position` on may be cached or matched yet: the caller, who knows how many tokens there
    /// are, sees to that. A salt that the sequence has from this position on already is not added again.
    pub fn salt_from(&mut self, position: usize, salt: Salt) {
        if salt.bytes().is_some() {
            let salts = &mut self.more.get_or_insert_default().salts;
            let (at, salt) = (salts.partition_point(|other| other.position <= position), SaltFrom { position, salt });
            if !salts.contains(&salt) {
                salts.insert(at, salt);
            }
        }
    }

    /// Removes the salts that begin at `position` or later. None of the tokens from there on may be cached or matched.
    pub fn remove_salts_from(&mut self, position: usize) {
        if let Some(more) = &mut self.more {
            more.salts.retain(|salt| salt.position < position);
        }
    }

    pub(crate) fn with_salts(mut self, salts: &[SaltFrom]) -> Self {
        if !salts.is_empty() {
            self.more.get_or_insert_default().salts = salts.to_vec();
        }
        self
    }

    /// Adds the cached blocks that continue these with `tokens`, and returns how many of the tokens they cover. `at` is
    /// the number of the first block to match: [`end`](Self::end).
    ///
    /// Nothing matches unless `at` is 0, or the block before is cached under the same key. In a group with a window, only
    /// those blocks are added that a sequence of the new length uses: the blocks of the sink tokens, and those that its
    /// next token sees. The last block added may match only in its first few tokens: it must be made writable with
    /// [`copy_on_write`](Self::copy_on_write) before the sequence continues in it.
    pub fn match_prefix(&mut self, key: &PrefixKey, at: usize, tokens: &[u32]) -> usize {
        if tokens.is_empty() {
            return 0;
        }
        let last = self.last(at);
        let room = self.pool.blocks_for(tokens.len()).min(self.pool.units());
        let Self { pool, first, more, epoch } = self;
        first.ids.reserve(room);
        let mut ledger = pool.ledger();
        if at == 0 {
            *epoch = ledger.epoch();
        }
        let query = |salts| Query { key, at, last, salts, tokens };
        let matched = match more.as_deref_mut() {
            None => ledger.match_prefix(query(&[]), |_, id| first.ids.push(id)),
            Some(More { others, salts, .. }) => ledger.match_prefix(query(salts), |group, id| match group {
                0 => first.ids.push(id),
                group => others[group - 1].ids.push(id),
            }),
        };
        drop(ledger);
        if matched > 0 && !self.is_simple() {
            self.pass_matched(at, at * self.pool.block_size() + matched);
        }
        matched
    }

    /// After a match from block `at` on, up to `len` tokens: frees the blocks that the sequence had before and that
    /// windows have passed now. The match has added no such blocks.
    fn pass_matched(&mut self, at: usize, len: usize) {
        let block_size = self.pool.block_size();
        for group in self.groups() {
            let span = self.span(group);
            if span.is_all() {
                continue;
            }
            let (sinks, passed) = (span.sink_blocks(block_size), span.freed_blocks(len, block_size));
            let had = at.saturating_sub(sinks).min(passed);
            self.free_after(group, sinks, had, Why::Passed);
            let list = self.list_mut(group);
            list.freed = list.freed.max(passed);
        }
    }

    /// Block number `at - 1` in any group that has it.
    fn last(&self, at: usize) -> Option<GroupBlock> {
        let number = at.checked_sub(1)?;
        self.groups().find_map(|group| Some(GroupBlock { group, block: self.block(group, number)? }))
    }

    /// Looks up what [`match_prefix`](Self::match_prefix) would match at this moment, and how many available units it
    /// would take to use that match and then to have slots for `slots` tokens from block number `at` on. With `chunk`,
    /// the sequence gets slots for at most this many tokens at a time, and windows free blocks in between. No block is
    /// used, and the statistics do not change.
    pub fn lookup_prefix(
        &self,
        key: &PrefixKey,
        at: usize,
        tokens: &[u32],
        slots: usize,
        chunk: Option<usize>,
    ) -> PrefixMatch {
        let query = Query { key, at, last: self.last(at), salts: self.salts(), tokens };
        self.pool.ledger().lookup_prefix(query, slots, chunk, |group| self.group(group))
    }

    /// How many available units it takes to have slots for the tokens at `positions`, which follow those that the
    /// sequence has, at most `chunk` of them at a time, so that the windows of the groups and of `key` free blocks in
    /// between. Nothing of them is looked up in the cache.
    pub fn growth_in_chunks(&self, key: &PrefixKey, positions: Range<usize>, chunk: usize) -> usize {
        let written = positions.start / self.pool.block_size();
        let lists = |group| (self.group(group), self.block(group, written));
        self.pool.ledger().growth_in_chunks(key.window, positions, self.end(), chunk, lists)
    }

    /// Caches the full blocks from number `at` on under their tokens, which are `head` followed by `tokens`. Returns how
    /// many blocks were exchanged for blocks with the same content that were cached before.
    ///
    /// Nothing is cached from lists that got their first block before the last
    /// [`reset_prefix_cache`](crate::BlockPool::reset_prefix_cache).
    ///
    /// Other sequences read what is cached from now on: every slot of these blocks must have been written. Nothing is
    /// cached after a block that is not cached, or that is cached under another key.
    ///
    /// # Errors
    ///
    /// [`AlreadyCached`] if block `at` is cached: it has the content of another computation, not of these tokens, and
    /// nothing can be cached after it here.
    pub fn cache(&mut self, key: &PrefixKey, at: usize, head: &[u32], tokens: &[u32]) -> Result<usize, AlreadyCached> {
        if head.len() >= self.pool.block_size() || at >= self.end() {
            return Ok(0);
        }
        let Self { pool, first, more, epoch } = self;
        let (others, salts) = match more.as_deref_mut() {
            Some(More { others, salts, .. }) => (&mut others[..], &salts[..]),
            None => (&mut [][..], &[][..]),
        };
        let content = Content { key, salts, at, head, tokens };
        let mut ledger = pool.ledger();
        let duplicates = if others.is_empty() {
            ledger.cache(*epoch, std::slice::from_mut(first), content)
        } else {
            let mut lists: SmallVec<[List; 4]> = SmallVec::new();
            lists.push(std::mem::take(first));
            lists.extend(others.iter_mut().map(std::mem::take));
            let duplicates = ledger.cache(*epoch, &mut lists, content);
            let mut lists = lists.into_iter();
            *first = lists.next().unwrap_or_default();
            others.iter_mut().zip(lists).for_each(|(other, list)| *other = list);
            duplicates
        };
        let written_through = ledger.take_written_through();
        let queue = if written_through.is_empty() { None } else { ledger.offload().cloned() };
        let leftovers = ledger.has_leftovers().then(|| ledger.take_leftovers());
        drop(ledger);
        drop(leftovers.map(|leftovers| pool.own(leftovers)));
        if let Some(queue) = queue {
            queue.add_written_through(written_through);
        }
        let duplicates = duplicates?;
        if !duplicates.is_empty() {
            pool.free_lists(duplicates.iter().map(|(group, id)| (*group, std::slice::from_ref(id))), Why::Ended);
        }
        Ok(duplicates.len())
    }

    /// Whether block number `at - 1` is cached as the end of `tokens`, which are `at` whole blocks, in a sequence with this
    /// key and the salts of this one. Also if `at` is 0.
    pub fn continues(&self, key: &PrefixKey, at: usize, tokens: &[u32]) -> bool {
        let Some(last) = self.last(at) else { return at == 0 };
        tokens.len() == at * self.pool.block_size() && self.pool.ledger().is_at_end_of(last, key, tokens, self.salts())
    }

    /// Copies the first `tokens.len()` tokens of block number `at` into `tokens`. Returns whether the block is cached:
    /// only then are its tokens known.
    pub fn cached_tokens(&self, at: usize, tokens: &mut [u32]) -> bool {
        let ledger = self.pool.ledger();
        let of = |group| ledger.tokens(group, self.block(group, at)?);
        let known = self.groups().find_map(of).and_then(|known| known.get(..tokens.len()));
        if let Some(known) = known {
            tokens.copy_from_slice(known);
        }
        known.is_some()
    }
}
