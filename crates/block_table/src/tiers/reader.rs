//! Reading a prefix from a tier.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use block_pool::{Blocks, PrefixKey, SaltFrom, Tier};

use super::FetchedPrefix;
use super::walk::Walk;
use crate::BlockTable;

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

/// Reads what a tier has of a sequence, piece after piece, apart from the sequence.
pub struct PrefixReader {
    /// Without blocks, for what the sequence's tokens see.
    blocks: Blocks,
    key: PrefixKey,
    salts: Vec<SaltFrom>,
    tokens: Vec<u32>,
    /// See [`BlockPool::epoch`](block_pool::BlockPool::epoch).
    epoch: u64,
    /// The numbers of the blocks that may still be read.
    numbers: Range<usize>,
    /// For these blocks, in which groups they seem to be in the tier. It ends with the last that is of use.
    has: Option<Vec<Vec<bool>>>,
}

impl PrefixReader {
    pub(super) fn new(table: &BlockTable, tokens: &[u32]) -> Self {
        let pool = table.pool();
        let block_size = pool.block_size();
        let start = table.len() / block_size;
        let end = if table.private { start } else { tokens.len().saturating_sub(1) / block_size };
        Self {
            blocks: Blocks::empty(pool).with_window(table.window()),
            key: table.key.clone(),
            salts: table.salts().to_vec(),
            tokens: tokens.to_vec(),
            epoch: pool.epoch(),
            numbers: start..end,
            has: None,
        }
    }

    /// How many tokens the sequence would have with what the tier seems to have; 0 if that is nothing.
    pub fn lookup(&self, tier: &dyn Tier) -> usize {
        let has = self.seemingly_in(tier);
        self.longest(&has, usize::MAX).unwrap_or(0) * self.block_size()
    }

    /// Reads the blocks that come next, as many as `limits` allow. The next call goes on after them.
    ///
    /// In a group with a window, only those blocks are read that a sequence of the new length uses. When the time is over,
    /// models without windows have what was read up to there, and others nothing.
    pub fn read(&mut self, tier: &dyn Tier, limits: &FetchLimits) -> FetchedPrefix {
        let until = Instant::now().checked_add(limits.max_time);
        let pool = self.blocks.pool();
        let mut fetched = FetchedPrefix {
            pool: pool.clone(),
            epoch: self.epoch,
            key: self.key.clone(),
            salts: self.salts.clone(),
            tokens: Vec::new(),
            start: self.numbers.start,
            blocks: Vec::new(),
            bytes: Vec::new(),
            has_more: false,
        };
        let start = self.numbers.start;
        let has_windows = (0..pool.groups().len()).any(|group| !self.blocks.span(group).is_all());
        let mut has = self.has.take().unwrap_or_else(|| self.seemingly_in(tier));
        // What seems to be there may turn out not to be: then it is a shorter prefix.
        while let Some(end) = self.longest(&has, limits.max_bytes) {
            let end = match self.read_blocks(tier, end, until, &mut fetched) {
                Ok(()) => {
                    fetched.has_more = self.longest(&has, usize::MAX) > Some(end);
                    end
                }
                // The blocks before are a prefix.
                Err(Unread { number, .. }) if !has_windows => {
                    fetched.cut(number);
                    number
                }
                Err(Unread { number, group, is_late: false }) => {
                    has[number - start][group] = false;
                    fetched.cut(0);
                    continue;
                }
                Err(Unread { .. }) => {
                    fetched.cut(0);
                    start
                }
            };
            if end > start {
                fetched.tokens.extend_from_slice(&self.tokens[..end * self.block_size()]);
            }
            self.numbers.start = end;
            has.drain(..end - start);
            self.has = Some(has);
            return fetched;
        }
        fetched.has_more = self.longest(&has, usize::MAX).is_some();
        self.has = Some(has);
        fetched
    }

    /// For the blocks that come next, in which groups they seem to be in the tier. It ends with the last that is of use.
    fn seemingly_in(&self, tier: &dyn Tier) -> Vec<Vec<bool>> {
        let groups = 0..self.blocks.pool().groups().len();
        if self.numbers.is_empty() {
            return Vec::new();
        }
        let mut walk = self.walk(tier);
        let has = self.numbers.clone().map(|number| {
            walk.advance_to(number);
            groups.clone().map(|group| walk.cursor.contains(group)).collect()
        });
        // Without a window, every block is needed.
        let is_of_use = |has: &Vec<bool>| groups.clone().all(|group| has[group] || !self.blocks.span(group).is_all());
        has.take_while(is_of_use).collect()
    }

    /// The end of the longest prefix whose next blocks are all there, as far as a sequence of that length has them, and
    /// take at most `max_bytes`.
    fn longest(&self, has: &[Vec<bool>], max_bytes: usize) -> Option<usize> {
        let (pool, start) = (self.blocks.pool(), self.numbers.start);
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
        end: usize,
        until: Option<Instant>,
        fetched: &mut FetchedPrefix,
    ) -> Result<(), Unread> {
        let (pool, len) = (self.blocks.pool(), end * self.block_size());
        let groups = 0..pool.groups().len();
        let wanted = (self.numbers.start..end).flat_map(|number| groups.clone().map(move |group| (group, number)));
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
        let threads = fetched.blocks.len().div_ceil(BLOCKS_PER_PIECE).min(MOST_THREADS);
        let pieces = fetched.blocks.chunks(BLOCKS_PER_PIECE).zip(chunks_of(destinations, BLOCKS_PER_PIECE));
        let (pieces, first_unread) = (Mutex::new(pieces), Mutex::new(None::<Unread>));
        let read = || {
            let mut walk = self.walk(tier);
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
        thread::scope(|scope| {
            for _ in 1..threads {
                // If there is none, the others read more.
                drop(thread::Builder::new().name("kv-read".into()).spawn_scoped(scope, read));
            }
            read();
        });
        drop(pieces);
        first_unread.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn walk<'a>(&'a self, tier: &'a dyn Tier) -> Walk<'a> {
        Walk::new(tier.cursor(&self.key), &self.tokens, &self.salts, self.block_size())
    }

    fn block_size(&self) -> usize {
        self.blocks.pool().block_size()
    }
}

/// Without tokens, which may be under a salt.
impl std::fmt::Debug for PrefixReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PrefixReader").field("numbers", &self.numbers).finish_non_exhaustive()
    }
}

/// A block that was not read.
struct Unread {
    number: usize,
    group: usize,
    /// There was no time for it; else it is missing.
    is_late: bool,
}

/// How many blocks a thread reads one after the other.
const BLOCKS_PER_PIECE: usize = 2;

/// How many threads read, at most: so many requests keep a disk busy while others are verified.
const MOST_THREADS: usize = 4;

/// The vector in pieces of `n`; the last one may be shorter.
fn chunks_of<T>(all: Vec<T>, n: usize) -> impl Iterator<Item = Vec<T>> {
    let mut rest = all.into_iter();
    std::iter::from_fn(move || Some(rest.by_ref().take(n).collect::<Vec<T>>()).filter(|piece| !piece.is_empty()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
