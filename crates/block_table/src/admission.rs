//! Who of the waiting may start, and who must yield.

use std::collections::VecDeque;

use block_pool::BlockPool;

/// A queue of requests that wait for room in the pool, and the rules by which they leave it.
///
/// First come, first served, with one exception: while the first does not fit, smaller ones behind it may go ahead, so
/// that the pool is not idle because of one long prompt. Only so many are looked at, and nobody is passed over more
/// than so often. Room is left for those who run to grow into, since a sequence that must yield is computed twice.
///
/// No request waits for ever: if everything that runs ends, every request either starts or is handed back as one that
/// can never start.
///
/// It decides and keeps the queue; the blocks are taken by the tables themselves.
///
/// ```
/// use block_pool::BlockPool;
/// use block_table::{Admission, Admitted, Need, Room};
///
/// let pool = BlockPool::new(/* blocks */ 10, 16)?;
/// let mut waiting = Admission::new();
/// ["a long prompt", "a short one", "a library"].map(|request| waiting.enqueue(request));
/// let need = |request: &&str| match *request {
///     "a short one" => Need::Blocks(2),
///     "a long prompt" => Need::Blocks(8),
///     _ => Need::Blocks(4000),
/// };
///
/// let room = Room { available: 6, running: 3 };
/// assert_eq!(waiting.admit(&pool, room, need), Some(Admitted::Start("a short one")));
/// let room = Room { available: 4, running: 4 };
/// assert_eq!(waiting.admit(&pool, room, need), Some(Admitted::Never("a library")));
/// assert_eq!(waiting.admit(&pool, room, need), None); // the long prompt waits for more room
///
/// // Computed tokens of those who run: the least computed yields.
/// assert_eq!(Admission::<&str>::who_yields([120, 35, 80]), Some(1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Admission<T> {
    waiting: VecDeque<Waiting<T>>,
    skip_ahead: usize,
    max_skips: u32,
    headroom: usize,
}

/// What a request takes to start, as the caller of [`Admission::admit`] sees it at that moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Need {
    /// So many of the blocks that are available. More than the pool has is the same as [`Never`](Self::Never).
    Blocks(usize),
    /// It cannot start now for another reason than blocks: there is no place in the batch, say. It waits like a request
    /// that does not fit. The reason must be gone, at the latest, when nothing runs.
    NotNow,
    /// It can never start: its prompt is longer than the model's context, say.
    Never,
}

/// What there is to give at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Blocks of the pool that are available and not promised to a running sequence.
    pub available: usize,
    /// Sequences that run. Each needs room to grow.
    pub running: usize,
}

/// A request that has left the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "the request is in the queue no more"]
pub enum Admitted<T> {
    /// It may start: there is room for it.
    Start(T),
    /// It can never start, however long it waits.
    Never(T),
}

#[derive(Debug, Clone)]
struct Waiting<T> {
    request: T,
    /// How often others have gone ahead of it.
    skipped: u32,
}

impl<T> Default for Admission<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Admission<T> {
    /// An empty queue: 32 are looked at, nobody is passed over more than 256 times, and 16 tokens are left for each who
    /// runs.
    pub fn new() -> Self {
        Self { waiting: VecDeque::new(), skip_ahead: 32, max_skips: 256, headroom: 16 }
    }

    /// How many of the waiting, from the first on, are looked at; 1 is strictly first come, first served.
    #[must_use]
    pub fn skip_ahead(self, requests: usize) -> Self {
        Self { skip_ahead: requests.max(1), ..self }
    }

    /// How often others may go ahead of one request, at most.
    #[must_use]
    pub fn max_skips(self, times: u32) -> Self {
        Self { max_skips: times, ..self }
    }

    /// How many tokens of room are left for each who runs.
    #[must_use]
    pub fn headroom(self, tokens: usize) -> Self {
        Self { headroom: tokens, ..self }
    }

    /// Adds a request behind the others.
    pub fn enqueue(&mut self, request: T) {
        self.waiting.push_back(Waiting { request, skipped: 0 });
    }

    /// Puts back, before the others, a request that had started and had to yield. It counts as not passed over yet.
    pub fn requeue(&mut self, request: T) {
        self.waiting.push_front(Waiting { request, skipped: 0 });
        // Last: these call the host's code, which may panic.
        metrics::counter!("kv_cache_preemptions").increment(1);
        tracing::debug!(waiting = self.waiting.len(), "a sequence yields");
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Those who wait, the first first.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.waiting.iter().map(|waiting| &waiting.request)
    }

    /// The most often that others have gone ahead of one who waits now.
    pub fn most_skipped(&self) -> u32 {
        self.waiting.iter().map(|waiting| waiting.skipped).max().unwrap_or(0)
    }

    /// Takes the requests that are `gone` out of the queue, of clients that hung up say, and returns them in their
    /// order.
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

    /// Takes the next request that may start out of the queue, or one that can never start. The others keep their
    /// order.
    ///
    /// `need` says what a request takes to start. When nothing runs, no room to grow is needed, and the first request
    /// that fits at all may start. The requests before the one that starts have been passed over, whether they lacked
    /// blocks or were [`Need::NotNow`]; a request that has been passed over often enough is waited for. Handing back
    /// one that can never start does not count as passing over those before it, and it does not keep those after it
    /// from starting.
    pub fn admit(&mut self, pool: &BlockPool, room: Room, mut need: impl FnMut(&T) -> Need) -> Option<Admitted<T>> {
        let headroom = pool.blocks_for(room.running.saturating_mul(self.headroom));
        let free = room.available.saturating_sub(headroom);
        for at in 0..self.skip_ahead.min(self.waiting.len()) {
            let waiting = &self.waiting[at];
            match need(&waiting.request) {
                Need::Never => return self.leave(at).map(Admitted::Never),
                Need::Blocks(blocks) if blocks > pool.blocks() => return self.leave(at).map(Admitted::Never),
                Need::Blocks(blocks) if blocks <= free => {
                    self.waiting.iter_mut().take(at).for_each(|passed| passed.skipped += 1);
                    return self.leave(at).map(Admitted::Start);
                }
                Need::Blocks(_) | Need::NotNow if waiting.skipped >= self.max_skips => return None,
                Need::Blocks(_) | Need::NotNow => {}
            }
        }
        None
    }

    fn leave(&mut self, at: usize) -> Option<T> {
        self.waiting.remove(at).map(|waiting| waiting.request)
    }

    /// Which of those who run must yield when the pool is full, by how many tokens each has computed: the least, and
    /// among equals the last.
    pub fn who_yields(computed: impl IntoIterator<Item = usize>) -> Option<usize> {
        let lengths = computed.into_iter().enumerate();
        lengths.min_by_key(|&(at, computed)| (computed, std::cmp::Reverse(at))).map(|(at, _)| at)
    }
}
