//! A sequence and the tiers below the pool: what it stores there, and what it starts with from there.
//!
//! Loading has two halves. [`BlockTable::fetch`] reads blocks into host memory: it takes as long as the tier takes, needs
//! no available block, and can run in any thread. [`BlockTable::insert`] copies them into the pool between two steps.

use std::num::NonZero;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block_pool::{BlockPool, PrefixKey, ReserveError, SaltFrom, StorageError, Tier, TierCursor};

use crate::table::Tokens;
use crate::{BlockTable, NotReserved};

/// Blocks of a prefix that were read from a tier and are not in the pool yet.
#[derive(Clone)]
pub struct FetchedPrefix {
    pool: BlockPool,
    /// See [`BlockPool::epoch`].
    epoch: u64,
    key: PrefixKey,
    salts: Vec<SaltFrom>,
    /// The tokens of the sequence up to the end of the last block.
    tokens: Vec<u32>,
    /// The number of the first block.
    start: usize,
    /// For each block its group, its number, and where it begins in `bytes`.
    blocks: Vec<(usize, usize, usize)>,
    bytes: Vec<u8>,
    has_more: bool,
}

/// How long reading a prefix may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchLimits {
    max_bytes: usize,
    max_time: Duration,
}

impl Default for FetchLimits {
    /// No limits.
    fn default() -> Self {
        Self { max_bytes: usize::MAX, max_time: Duration::MAX }
    }
}

impl FetchLimits {
    /// Reads at most this many bytes: between two steps, this bounds how long others wait. It is also the memory that a
    /// [`FetchedPrefix`] takes.
    #[must_use]
    pub fn max_bytes(self, bytes: usize) -> Self {
        Self { max_bytes: bytes, ..self }
    }

    /// Begins to read no more blocks after this time, for example the time that it takes to compute the tokens.
    #[must_use]
    pub fn max_time(self, time: Duration) -> Self {
        Self { max_time: time, ..self }
    }
}

impl FetchedPrefix {
    /// How many tokens the sequence has with these blocks; 0 if there are none.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing was fetched.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Whether the tier seems to have more of the sequence, beyond the most bytes.
    pub fn has_more(&self) -> bool {
        self.has_more
    }

    /// How many bytes of host memory the blocks take.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// Without tokens and bytes, which may be under a salt.
impl std::fmt::Debug for FetchedPrefix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FetchedPrefix").field("len", &self.len()).field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

/// How many blocks of a prefix a tier got.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredPrefix {
    /// Blocks that it did not have.
    pub new: usize,
    /// Blocks that it had.
    pub already: usize,
}

impl BlockTable {
    /// How many of `tokens`, which are all tokens of the sequence, it would have with what a tier seems to have, or 0 if
    /// that is nothing. Nothing is read.
    pub fn lookup_tier(&self, tier: &dyn Tier, tokens: &[u32]) -> usize {
        let block_size = self.pool().block_size();
        let numbers = self.len / block_size..tokens.len().saturating_sub(1) / block_size;
        if self.private || numbers.is_empty() {
            return 0;
        }
        let has = self.seemingly_in(tier, tokens, numbers.clone());
        self.longest(&has, numbers.start, usize::MAX).unwrap_or(0) * block_size
    }

    /// Reads from a tier the blocks that continue this sequence, up to `tokens`, which are all tokens of the sequence, and
    /// within `limits`. Call it after [`match_prefix`](Self::match_prefix), and [`insert`](Self::insert) with the result.
    /// As there, the last of `tokens` is never found.
    ///
    /// In a group with a window, only those blocks are read that a sequence of the new length uses. When the time is over,
    /// models without windows have what was read up to there, and others nothing.
    pub fn fetch(&self, tier: &dyn Tier, tokens: &[u32], limits: &FetchLimits) -> FetchedPrefix {
        let until = Instant::now().checked_add(limits.max_time);
        let pool = self.pool();
        let block_size = pool.block_size();
        let numbers = self.len / block_size..tokens.len().saturating_sub(1) / block_size;
        let mut fetched = FetchedPrefix {
            pool: pool.clone(),
            epoch: pool.epoch(),
            key: self.key.clone(),
            salts: self.salts().to_vec(),
            tokens: Vec::new(),
            start: numbers.start,
            blocks: Vec::new(),
            bytes: Vec::new(),
            has_more: false,
        };
        if self.private || numbers.is_empty() {
            return fetched;
        }
        let has_windows = (0..pool.groups().len()).any(|group| !self.blocks.span(group).is_all());
        let mut has = self.seemingly_in(tier, tokens, numbers.clone());
        // What seems to be there may turn out not to be: then it is a shorter prefix.
        while let Some(end) = self.longest(&has, numbers.start, limits.max_bytes) {
            let read = self.read_blocks(tier, tokens, numbers.start..end, until, &mut fetched);
            let end = match read {
                Ok(()) => {
                    fetched.has_more = self.longest(&has, numbers.start, usize::MAX) > Some(end);
                    end
                }
                // The blocks before are a prefix.
                Err(Unread { number, .. }) if !has_windows => {
                    fetched.cut(number);
                    number
                }
                Err(Unread { number, group, is_late: false }) => {
                    has[number - numbers.start][group] = false;
                    fetched.cut(0);
                    continue;
                }
                Err(Unread { .. }) => {
                    fetched.cut(0);
                    return fetched;
                }
            };
            if end > numbers.start {
                fetched.tokens.extend_from_slice(&tokens[..end * block_size]);
            }
            return fetched;
        }
        fetched.has_more = self.longest(&has, numbers.start, usize::MAX).is_some();
        fetched
    }

    /// For blocks with these numbers, in which groups they seem to be in the tier. It ends with the last that is of use.
    fn seemingly_in(&self, tier: &dyn Tier, tokens: &[u32], numbers: Range<usize>) -> Vec<Vec<bool>> {
        let groups = 0..self.pool().groups().len();
        let mut walk = Walk::new(tier, self, tokens);
        let has = numbers.map(|number| {
            walk.advance_to(number);
            groups.clone().map(|group| walk.cursor.contains(group)).collect()
        });
        // Without a window, every block is needed.
        let is_of_use = |has: &Vec<bool>| groups.clone().all(|group| has[group] || !self.blocks.span(group).is_all());
        has.take_while(is_of_use).collect()
    }

    /// The end of the longest prefix whose blocks from `start` on are all there, as far as a sequence of that length
    /// has them, and take at most `max_bytes`.
    fn longest(&self, has: &[Vec<bool>], start: usize, max_bytes: usize) -> Option<usize> {
        let pool = self.pool();
        let block_size = pool.block_size();
        let (full, windowed): (Vec<usize>, Vec<usize>) =
            (0..pool.groups().len()).partition(|&group| self.blocks.span(group).is_all());
        let per_block: usize = full.iter().map(|&group| pool.bytes_per_block(group)).sum();
        let whole = has.iter().take_while(|has| full.iter().all(|&group| has[group])).count();
        let most = max_bytes.checked_div(per_block).map_or(whole, |most| whole.min(most));
        (1..=most).rev().map(|blocks| start + blocks).find(|&end| {
            let mut bytes = (end - start) * per_block;
            let mut is_there = |group: usize| {
                let span = self.blocks.span(group);
                let sinks = span.sink_blocks(block_size);
                let seen = sinks + span.freed_blocks(end * block_size, block_size);
                let mut kept = (start..sinks.min(end)).chain(seen.max(start)..end);
                kept.all(|number| {
                    bytes += pool.bytes_per_block(group);
                    has[number - start][group]
                })
            };
            windowed.iter().all(|&group| is_there(group)) && bytes <= max_bytes
        })
    }

    /// Reads the blocks of a prefix, or those before the first that is missing or for which there is no time.
    ///
    /// Several threads read: a disk is faster with several requests, and what is read has to be verified.
    fn read_blocks(
        &self,
        tier: &dyn Tier,
        tokens: &[u32],
        numbers: Range<usize>,
        until: Option<Instant>,
        fetched: &mut FetchedPrefix,
    ) -> Result<(), Unread> {
        let pool = self.pool();
        let len = numbers.end * pool.block_size();
        let groups = 0..pool.groups().len();
        let wanted = numbers.flat_map(|number| groups.clone().map(move |group| (group, number)));
        let wanted = wanted.filter(|&(group, number)| self.blocks.is_kept(group, number, len));
        let mut total = 0;
        fetched.blocks = wanted
            .map(|(group, number)| {
                total += pool.bytes_per_block(group);
                (group, number, total - pool.bytes_per_block(group))
            })
            .collect();
        fetched.bytes = vec![0; total];
        let mut rest = &mut fetched.bytes[..];
        let mut destinations = Vec::with_capacity(fetched.blocks.len());
        for &(group, ..) in &fetched.blocks {
            let (first, others) = rest.split_at_mut(pool.bytes_per_block(group));
            destinations.push(first);
            rest = others;
        }
        let threads = fetched.blocks.len().div_ceil(BLOCKS_PER_PIECE).min(most_threads());
        let pieces = fetched.blocks.chunks(BLOCKS_PER_PIECE).zip(chunks_of(destinations, BLOCKS_PER_PIECE));
        let (pieces, first_unread) = (Mutex::new(pieces), Mutex::new(None::<Unread>));
        let read = || {
            let mut walk = Walk::new(tier, self, tokens);
            loop {
                let piece = lock(&pieces).next();
                let Some((blocks, destinations)) = piece else { return };
                for (&(group, number, _), to) in blocks.iter().zip(destinations) {
                    let mut unread = None;
                    if until.is_some_and(|until| Instant::now() >= until) {
                        unread = Some(Unread { number, group, is_late: true });
                    } else {
                        walk.advance_to(number);
                        match walk.cursor.load(group).filter(|bytes| bytes.len() == to.len()) {
                            Some(bytes) => to.copy_from_slice(bytes),
                            None => unread = Some(Unread { number, group, is_late: false }),
                        }
                    }
                    let mut first = lock(&first_unread);
                    let place = |of: &Unread| (of.number, of.group);
                    if let Some(unread) = unread
                        && first.as_ref().is_none_or(|first| place(&unread) < place(first))
                    {
                        *first = Some(unread);
                    }
                    // What comes after it is of no use.
                    if first.as_ref().is_some_and(|first| place(first) <= (number, group)) {
                        return;
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            (1..threads).for_each(|_| drop(scope.spawn(read)));
            read();
        });
        drop(pieces);
        first_unread.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Adds fetched blocks to the table: they become cached blocks of the pool, as if they had been computed. Returns how
    /// many tokens the sequence has gained; 0 if it or the pool's cache is not as it was when they were fetched, or if
    /// nothing was fetched. A block that had been matched in part is replaced.
    ///
    /// The blocks of all tokens that are added are allocated at once, and windows free theirs after that.
    ///
    /// # Errors
    ///
    /// [`ReserveError::OutOfBlocks`] when too few blocks are available; the table may have lost what it had matched of
    /// its last block. [`ReserveError::Storage`] when the pool's memory cannot be written; the table is empty then.
    pub fn insert(&mut self, fetched: &FetchedPrefix) -> Result<usize, ReserveError> {
        let block_size = self.pool().block_size();
        let (before, start) = (self.len, fetched.start * block_size);
        // If a window has passed what the beginning of the last block sees, it is computed.
        if !self.continues_with(fetched) || self.truncate(start).is_err() {
            return Ok(0);
        }
        self.reserve(fetched.len() - start)?;
        // What windows have passed at the new length was not fetched, and must not be cached.
        let unless_written = Emptied(self);
        unless_written.0.blocks.free_invisible(fetched.len());
        for &(group, number, at) in &fetched.blocks {
            let bytes = &fetched.bytes[at..at + fetched.pool.bytes_per_block(group)];
            unless_written.0.blocks.write(group, number, bytes)?;
        }
        std::mem::forget(unless_written);
        match self.commit_tokens(&fetched.tokens[start..]) {
            Ok(()) => Ok(self.len.saturating_sub(before)),
            Err(NotReserved { .. }) => Ok(0),
        }
    }

    /// Whether the table is what the blocks were fetched for.
    fn continues_with(&self, fetched: &FetchedPrefix) -> bool {
        let FetchedPrefix { pool, epoch, key, salts, tokens, start, blocks, .. } = fetched;
        let block_size = pool.block_size();
        let is_same = pool.is_same(self.pool()) && *epoch == pool.epoch() && *key == self.key && salts == self.salts();
        if blocks.is_empty() || self.private || !is_same || self.len / block_size != *start {
            return false;
        }
        // Nothing can be cached after blocks whose tokens are not known.
        let own = if *start > 0 { self.blocks.cached_prefix() } else { None };
        let own = own.map(|prefix| prefix.tokens).unwrap_or_default();
        own.len() >= start * block_size && own[..start * block_size] == tokens[..start * block_size]
    }

    /// Stores the full blocks of this sequence in a tier, as far as their tokens are known and they are cached. In a group
    /// with a window, those are stored that the window has not passed.
    ///
    /// # Errors
    ///
    /// [`StorageError`] when the pool's memory cannot be read or the tier cannot store a block. What was stored before
    /// stays there.
    pub fn store_prefix(&self, tier: &dyn Tier) -> Result<StoredPrefix, StorageError> {
        let mut stored = StoredPrefix::default();
        let Some(prefix) = self.blocks.cached_prefix() else { return Ok(stored) };
        let block_size = self.pool().block_size();
        let mut cursor = tier.cursor(&prefix.key);
        let mut bytes = Vec::new();
        for (number, tokens) in prefix.tokens.chunks_exact(block_size).enumerate() {
            cursor.advance(tokens, salts_of(&prefix.salts, number, block_size));
            for group in 0..self.pool().groups().len() {
                if self.blocks.block(group, number).is_some() && cursor.contains(group) {
                    stored.already += 1;
                    continue;
                }
                bytes.clear();
                if self.blocks.read(group, number, &mut bytes)? {
                    match cursor.store(group, &bytes)? {
                        true => stored.new += 1,
                        false => stored.already += 1,
                    }
                }
            }
        }
        Ok(stored)
    }
}

impl FetchedPrefix {
    /// Keeps the blocks before number `end`.
    fn cut(&mut self, end: usize) {
        let kept = self.blocks.partition_point(|&(_, number, _)| number < end);
        self.bytes.truncate(self.blocks.get(kept).map_or(self.bytes.len(), |&(_, _, at)| at));
        self.blocks.truncate(kept);
    }
}

/// A block that was not read.
struct Unread {
    number: usize,
    group: usize,
    /// There was no time for it; else it is missing.
    is_late: bool,
}

/// A table that becomes empty when this is dropped: windows have freed blocks for tokens that it does not have.
struct Emptied<'a>(&'a mut BlockTable);

impl Drop for Emptied<'_> {
    fn drop(&mut self) {
        let BlockTable { blocks, len, tail, .. } = &mut *self.0;
        (*len, *tail) = (0, Some(Tokens::new()));
        // The first token sees nothing that was freed, so it cannot fail.
        let _ = blocks.go_back(0);
    }
}

/// How many blocks a thread reads one after the other.
const BLOCKS_PER_PIECE: usize = 8;

fn most_threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get).min(4)
}

/// The vector in pieces of `n`; the last one may be shorter.
fn chunks_of<T>(all: Vec<T>, n: usize) -> impl Iterator<Item = Vec<T>> {
    let mut rest = all.into_iter();
    std::iter::from_fn(move || Some(rest.by_ref().take(n).collect::<Vec<T>>()).filter(|piece| !piece.is_empty()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Those of the salts that begin in a block.
fn salts_of(salts: &[SaltFrom], number: usize, block_size: usize) -> &[SaltFrom] {
    SaltFrom::at(salts, number * block_size..(number + 1) * block_size)
}

/// A cursor that goes over the blocks of a sequence.
struct Walk<'a> {
    cursor: Box<dyn TierCursor + 'a>,
    tokens: &'a [u32],
    salts: &'a [SaltFrom],
    block_size: usize,
    /// The number of the next block.
    next: usize,
}

impl<'a> Walk<'a> {
    fn new(tier: &'a dyn Tier, table: &'a BlockTable, tokens: &'a [u32]) -> Self {
        let block_size = table.pool().block_size();
        Self { cursor: tier.cursor(&table.key), tokens, salts: table.salts(), block_size, next: 0 }
    }

    /// Goes on to block `number`.
    fn advance_to(&mut self, number: usize) {
        while self.next <= number {
            let tokens = &self.tokens[self.next * self.block_size..][..self.block_size];
            self.cursor.advance(tokens, salts_of(self.salts, self.next, self.block_size));
            self.next += 1;
        }
    }
}
