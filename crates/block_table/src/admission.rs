//! Which waiting request may start, and which running sequence is preempted.

use std::collections::VecDeque;

use block_pool::{BlockPool, PrefixMatch};

/// A queue of requests that wait for room in the pool, and the rules by which they leave it.
///
/// Of the first [`skip_ahead`](Self::skip_ahead) requests, and of the first [`prefix_ahead`](Self::prefix_ahead) of which
/// something is cached, one starts that fits: the one of which most tokens are cached, as its prefix is used before it is
/// evicted, and among equals the one that came first. (SGLang calls this order *longest prefix match*; Zheng et al.,
/// "SGLang", 2024, section 3.) So a request can start before an earlier one, and one long prompt does not leave the pool
/// idle; but each request is skipped at most [`max_skips`](Self::max_skips) times. A [`watermark`](Self::watermark) of
/// blocks is kept free for running sequences to grow into, since a preempted sequence is computed twice.
///
/// No request waits for ever: if every running sequence ends, every request either starts or is returned as one that
/// can never start.
///
/// This type keeps the queue and decides. It allocates no blocks; the tables do. In a pool with several groups of
/// layers, all numbers of blocks here are units: see [`BlockPool`].
///
/// ```
/// use block_pool::BlockPool;
/// use block_table::{Admission, Admitted, Need, Room, preemption_victim};
///
/// let pool = BlockPool::new(/* blocks */ 20, 16)?;
/// let mut waiting = Admission::new();
/// ["a library", "a long prompt", "a short one", "the next turn of a chat"].map(|request| waiting.enqueue(request));
/// let need = |request: &&str| match *request {
///     "a library" => Need::Blocks(4000),
///     "a long prompt" => Need::Blocks(12),
///     "a short one" => Need::Blocks(2),
///     _ => Need::Prefix { blocks: 2, cached: 480 }, // from `BlockTable::lookup_prefix`
/// };
///
/// let mut start = |available, running| waiting.admit(&pool, Room { available, running }, need);
/// assert_eq!(start(10, 3), Some(Admitted::Never("a library")));
/// assert_eq!(start(10, 3), Some(Admitted::Start("the next turn of a chat")));
/// assert_eq!(start(10, 4), Some(Admitted::Start("a short one")));
/// assert_eq!(start(10, 5), None); // the long prompt waits for more room
///
/// // The computed tokens of each running sequence: the one with the fewest is preempted.
/// assert_eq!(preemption_victim([120, 35, 80]), Some(1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Admission<T> {
    waiting: VecDeque<Waiting<T>>,
    skip_ahead: usize,
    max_skips: u32,
    watermark: usize,
    prefix_ahead: usize,
}

/// What a request needs to start, according to the caller of [`Admission::admit`] at that moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Need {
    /// This many of the available blocks. More blocks than the pool has in total mean [`Never`](Self::Never).
    Blocks(usize),
    /// The same for a request of which a prefix is cached: what [`BlockTable::lookup_prefix`] has found.
    ///
    /// [`BlockTable::lookup_prefix`]: crate::BlockTable::lookup_prefix
    Prefix {
        /// The available blocks that it needs beyond the cached ones.
        blocks: usize,
        /// The number of its tokens that are cached.
        cached: usize,
    },
    /// It cannot start now for a reason other than blocks, for example because the batch is full. It waits like a
    /// request that does not fit. The reason must have gone when no sequence runs, at the latest.
    NotNow,
    /// It can never start, for example because its prompt is longer than the model's context.
    Never,
}

impl From<PrefixMatch> for Need {
    fn from(found: PrefixMatch) -> Self {
        Self::Prefix { blocks: found.blocks, cached: found.tokens }
    }
}

/// The room in the pool at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Available blocks of the pool that are not promised to a running sequence.
    pub available: usize,
    /// The number of running sequences. Each needs room to grow.
    pub running: usize,
}

/// A request that has left the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "the request is no longer in the queue"]
pub enum Admitted<T> {
    /// It may start: there is room for it.
    Start(T),
    /// It can never start, however long it waits.
    Never(T),
}

#[derive(Debug, Clone)]
struct Waiting<T> {
    request: T,
    /// How many requests after it have started before it.
    skipped: u32,
}

impl<T> Default for Admission<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Admission<T> {
    /// An empty queue with `skip_ahead` 32, `prefix_ahead` 128, `max_skips` 256 and a `watermark` of 16 tokens for each
    /// running sequence.
    pub fn new() -> Self {
        Self { waiting: VecDeque::new(), skip_ahead: 32, prefix_ahead: 128, max_skips: 256, watermark: 16 }
    }

    /// How many requests are considered, from the first on, whatever is cached of them; 1 is strictly first come, first
    /// served, if nothing is cached. 0 counts as 1.
    #[must_use]
    pub fn skip_ahead(self, requests: usize) -> Self {
        Self { skip_ahead: requests.max(1), ..self }
    }

    /// How many requests may start before one that came earlier, at most.
    #[must_use]
    pub fn max_skips(self, times: u32) -> Self {
        Self { max_skips: times, ..self }
    }

    /// How many tokens of room are kept free for each running sequence to grow into.
    #[must_use]
    pub fn watermark(self, tokens: usize) -> Self {
        Self { watermark: tokens, ..self }
    }

    /// How many requests are considered, from the first on, for what is cached of them. One of which more tokens are
    /// cached starts before earlier ones that fit, too. Beyond [`skip_ahead`](Self::skip_ahead) it must leave three times
    /// the watermark free. With 0 the first that fits starts, whatever is cached.
    #[must_use]
    pub fn prefix_ahead(self, requests: usize) -> Self {
        Self { prefix_ahead: requests, ..self }
    }

    /// Adds a request at the end of the queue.
    pub fn enqueue(&mut self, request: T) {
        self.waiting.push_back(Waiting { request, skipped: 0 });
    }

    /// Puts a preempted request back at the front of the queue. Its count of skips starts at 0 again.
    pub fn requeue(&mut self, request: T) {
        self.waiting.push_front(Waiting { request, skipped: 0 });
        // Last: these call the host's code, which may panic.
        metrics::counter!("kv_cache_preemptions").increment(1);
        tracing::debug!(waiting = self.waiting.len(), "a sequence was preempted");
    }

    /// How many requests wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether no request waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The waiting requests, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.waiting.iter().map(|waiting| &waiting.request)
    }

    /// The highest number of times that a request which waits now has been skipped.
    pub fn most_skipped(&self) -> u32 {
        self.waiting.iter().map(|waiting| waiting.skipped).max().unwrap_or(0)
    }

    /// Removes the requests for which `gone` is true, for example those of clients that hung up, and returns them in
    /// their order.
    pub fn remove_if(&mut self, mut gone: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut removed = Vec::new();
        for waiting in std::mem::take(&mut self.waiting) {
            match gone(&waiting.request) {
                true => removed.push(waiting.request),
                false => self.waiting.push_back(waiting),
            }
        }
        removed
    }

    /// Removes the next request that may start, or one that can never start, from the queue and returns it. The other
    /// requests keep their order.
    ///
    /// `need` says what a request needs to start. When no sequence runs, no watermark is kept. When a request starts, each
    /// request before it has been skipped once, whether it lacked blocks or was [`Need::NotNow`]. No request starts before
    /// one that has been skipped [`max_skips`](Self::max_skips) times. Returning a request that can never start does not
    /// count as a skip for those before it, and does not keep those after it from starting.
    pub fn admit(&mut self, pool: &BlockPool, room: Room, mut need: impl FnMut(&T) -> Need) -> Option<Admitted<T>> {
        let watermark = pool.blocks_for(room.running.saturating_mul(self.watermark));
        let watermark = watermark.saturating_mul(pool.units_per_block());
        let free = room.available.saturating_sub(watermark);
        // Where the request is that starts, and how many of its tokens are cached.
        let mut best: Option<(usize, usize)> = None;
        for (at, waiting) in self.waiting.iter().enumerate().take(self.skip_ahead.max(self.prefix_ahead)) {
            let found = match need(&waiting.request) {
                Need::Blocks(blocks) => Some((blocks, 0)),
                Need::Prefix { blocks, cached } => Some((blocks, cached)),
                Need::NotNow => None,
                Need::Never => return self.remove(at).map(Admitted::Never),
            };
            if found.is_some_and(|(blocks, _)| blocks > pool.blocks()) {
                return self.remove(at).map(Admitted::Never);
            }
            let fits = |blocks: usize, cached: usize| match at < self.skip_ahead {
                true => blocks <= free,
                // Three times the watermark: what starts out of turn should not be preempted.
                false => cached > 0 && blocks <= free.saturating_sub(watermark.saturating_mul(2)),
            };
            // Among equals the one that came first.
            let better = |&(blocks, cached): &(usize, usize)| {
                fits(blocks, cached) && best.is_none_or(|(_, most)| at < self.prefix_ahead && cached > most)
            };
            best = found.filter(better).map(|(_, cached)| (at, cached)).or(best);
            if waiting.skipped >= self.max_skips || best.is_some() && at + 1 >= self.prefix_ahead {
                break;
            }
        }
        let (at, _) = best?;
        self.waiting.iter_mut().take(at).for_each(|earlier| earlier.skipped += 1);
        self.remove(at).map(Admitted::Start)
    }

    fn remove(&mut self, at: usize) -> Option<T> {
        self.waiting.remove(at).map(|waiting| waiting.request)
    }
}

/// The index of the running sequence to preempt when the pool is full, given how many tokens each has computed: the one
/// with the fewest, and the last of several with equally few. `None` if there are none. A sequence that has computed
/// nothing has no blocks: it can go back to the queue, but that frees none.
pub fn preemption_victim(computed: impl IntoIterator<Item = usize>) -> Option<usize> {
    let lengths = computed.into_iter().enumerate();
    lengths.min_by_key(|&(at, computed)| (computed, std::cmp::Reverse(at))).map(|(at, _)| at)
}
