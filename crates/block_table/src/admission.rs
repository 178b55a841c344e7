//! Who of the waiting may start, and who must yield.

use std::collections::VecDeque;

use block_pool::BlockPool;

/// A queue of requests that wait for room in the pool, and the rules by which they leave it.
///
/// First come, first served, with one exception: while the first does not fit, smaller ones behind it may go ahead, so
/// that the pool is not idle because of one long prompt. Only so many are looked at, and nobody is passed over more
/// than so often. Room is left for those who run to grow into, since a sequence that must yield is computed twice.
///
/// It decides and keeps the queue; the blocks are taken by the tables themselves.
///
/// ```
/// use block_pool::BlockPool;
/// use block_table::Admission;
///
/// let pool = BlockPool::new(/* blocks */ 10, 16)?;
/// let mut waiting = Admission::new();
/// waiting.enqueue("a long prompt");
/// waiting.enqueue("a short one");
/// let blocks_needed = |request: &&str| if request.contains("long") { 40 } else { 2 };
///
/// let available = pool.available();
/// assert_eq!(waiting.admit(&pool, available, /* running */ 3, blocks_needed), Some("a short one"));
/// assert_eq!(waiting.admit(&pool, available - 2, 4, blocks_needed), None);
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

    /// Puts back, before the others, one who had started and had to yield.
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

    /// Takes out of the queue the next who may start.
    ///
    /// `available` blocks of `pool` are not promised to anybody; `running` sequences run and need room to grow. `needed`
    /// says how many blocks a request takes to start. When nobody runs, nobody needs room to grow, and the first request
    /// that fits at all may start.
    pub fn admit(
        &mut self,
        pool: &BlockPool,
        available: usize,
        running: usize,
        mut needed: impl FnMut(&T) -> usize,
    ) -> Option<T> {
        let headroom = pool.blocks_for(running.saturating_mul(self.headroom));
        let room = available.saturating_sub(headroom);
        let mut next = None;
        for (at, waiting) in self.waiting.iter().enumerate().take(self.skip_ahead) {
            if needed(&waiting.request) <= room {
                next = Some(at);
                break;
            }
            // Whoever has been passed over often enough is waited for.
            if waiting.skipped >= self.max_skips {
                break;
            }
        }
        let next = next?;
        for passed in self.waiting.iter_mut().take(next) {
            passed.skipped += 1;
        }
        self.waiting.remove(next).map(|waiting| waiting.request)
    }

    /// Which of those who run must yield when the pool is full, by how many tokens each has computed: the least, and
    /// among equals the last.
    pub fn who_yields(computed: impl IntoIterator<Item = usize>) -> Option<usize> {
        let lengths = computed.into_iter().enumerate();
        lengths.min_by_key(|&(at, computed)| (computed, std::cmp::Reverse(at))).map(|(at, _)| at)
    }
}
