//! KV events: they inform a router of the prefixes that a pool has cached.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::Duration;

use crate::pool::WeakPool;
use crate::{BlockId, GroupBlock, PrefixKey, SaltFrom};

/// A change of what the pool has cached. A receiver that applies all events in order rebuilds the pool's prefix tree.
///
/// With the feature `serde` an event can be serialised.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(tag = "event", rename_all = "snake_case"))]
#[non_exhaustive]
pub enum KvEvent {
    /// A full block became cached: it is found by its tokens and salts and those of its ancestors. In a pool with
    /// several groups, the tokens are found when the blocks of all groups that the next token sees are cached.
    BlockStored {
        /// The group of layers whose keys and values it has; 0 in a pool with one group.
        group: usize,
        /// The block.
        block: BlockId,
        /// A block of the tokens before it in the prefix, of any group, which was stored earlier; `None` for the first
        /// tokens.
        parent: Option<GroupBlock>,
        /// The tokens of the block, `block_size` of them. In the events that a stream begins with, they may be preceded
        /// by the tokens of blocks between `parent` and this one that were removed before the stream began. Then these
        /// are several times `block_size` tokens, and the last `block_size` are those of this block.
        tokens: Vec<u32>,
        /// What must match in addition to the tokens.
        key: PrefixKey,
        /// The salts that begin among `tokens`, in the order of their positions in the sequence. They must match, too:
        /// together with those of the ancestors, they are all salts of the sequence up to the end of this block. So a
        /// block in which a salt begins does not match, not even in part, the block of a sequence that has no salt or
        /// another salt there.
        #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Vec::is_empty"))]
        salts: Vec<SaltFrom>,
    },
    /// The block is not cached any more. Its node stays in the prefix tree as a tombstone while other blocks follow it,
    /// which sequences with a window may still match.
    BlockRemoved {
        /// Its group of layers.
        group: usize,
        /// The block.
        block: BlockId,
    },
    /// No block is cached any more.
    AllBlocksCleared,
}

/// A stream of [`KvEvent`]s; see [`BlockPool::subscribe`](crate::BlockPool::subscribe). As an iterator it waits for the
/// next event, and ends when the pool is dropped.
#[derive(Debug)]
pub struct KvEvents {
    past: std::vec::IntoIter<KvEvent>,
    live: Live,
    pool: WeakPool,
}

impl KvEvents {
    pub(crate) fn new(past: Vec<KvEvent>, live: Live, pool: WeakPool) -> Self {
        Self { past: past.into_iter(), live, pool }
    }

    /// Waits for the next event and returns it.
    ///
    /// # Errors
    ///
    /// [`RecvError`] when the pool has been dropped.
    pub fn recv(&mut self) -> Result<KvEvent, RecvError> {
        self.next_by(Receiver::recv)
    }

    /// Waits for the next event for at most this long.
    ///
    /// # Errors
    ///
    /// [`RecvTimeoutError`] when there is none until then, or the pool has been dropped.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<KvEvent, RecvTimeoutError> {
        self.next_by(|live| live.recv_timeout(timeout))
    }

    /// Returns the next event, if there is one now.
    ///
    /// # Errors
    ///
    /// [`TryRecvError`] when there is none now, or the pool has been dropped.
    pub fn try_recv(&mut self) -> Result<KvEvent, TryRecvError> {
        self.next_by(Receiver::try_recv)
    }

    /// The events that have arrived by now.
    pub fn try_iter(&mut self) -> impl Iterator<Item = KvEvent> {
        std::iter::from_fn(|| self.try_recv().ok())
    }

    /// Begins again, for receivers further on that have lost events: the next event is
    /// [`AllBlocksCleared`](KvEvent::AllBlocksCleared), and then comes what is cached now. Takes as long as
    /// [`BlockPool::subscribe`](crate::BlockPool::subscribe).
    pub fn begin_again(&mut self) {
        let Some(pool) = self.pool.upgrade() else { return };
        let again = pool.subscribe_within(self.live.waiting.most);
        let mut past = vec![KvEvent::AllBlocksCleared];
        past.extend(again.past);
        (self.past, self.live) = (past.into_iter(), again.live);
    }

    fn next_by<E>(&mut self, receive: impl Fn(&Receiver<KvEvent>) -> Result<KvEvent, E>) -> Result<KvEvent, E> {
        loop {
            if self.live.waiting.has_overflowed() {
                self.begin_again();
            }
            if let Some(event) = self.past.next() {
                return Ok(event);
            }
            let received = receive(&self.live.receiver);
            match received {
                Ok(_) => self.live.waiting.one_less(),
                // The sender went because there were too many, between the check above and the call.
                Err(_) if self.live.waiting.has_overflowed() && self.pool.upgrade().is_some() => continue,
                Err(_) => {}
            }
            return received;
        }
    }
}

impl Iterator for KvEvents {
    type Item = KvEvent;

    fn next(&mut self) -> Option<KvEvent> {
        self.recv().ok()
    }
}

/// The receiving end of a subscription, from its beginning on.
#[derive(Debug)]
pub(crate) struct Live {
    receiver: Receiver<KvEvent>,
    waiting: Arc<Waiting>,
}

/// How many events wait in a channel, and how many may.
#[derive(Debug)]
struct Waiting {
    now: AtomicUsize,
    most: usize,
    overflowed: AtomicBool,
}

impl Waiting {
    /// Counts an event that is about to be sent. Returns false if there is no room for it, now and for ever.
    fn one_more(&self) -> bool {
        let has_room = self.now.fetch_add(1, Ordering::Relaxed) < self.most;
        if !has_room {
            self.overflowed.store(true, Ordering::Release);
        }
        has_room
    }

    fn one_less(&self) {
        self.now.fetch_sub(1, Ordering::Relaxed);
    }

    fn has_overflowed(&self) -> bool {
        self.overflowed.load(Ordering::Acquire)
    }
}

/// The subscribers. While there are none, no event is built and nothing is allocated.
#[derive(Debug, Default)]
pub(crate) struct Subscribers(Vec<(Sender<KvEvent>, Arc<Waiting>)>);

impl Subscribers {
    /// Adds a subscriber for which at most this many events wait.
    pub(crate) fn add(&mut self, most: usize) -> Live {
        let (sender, receiver) = channel();
        let waiting = Arc::new(Waiting { now: AtomicUsize::new(0), most, overflowed: AtomicBool::new(false) });
        self.0.push((sender, waiting.clone()));
        Live { receiver, waiting }
    }

    /// Sends the event to every subscriber. Those whose receiver was dropped are removed, and those that have too many
    /// events waiting: they subscribe again.
    #[inline]
    pub(crate) fn publish(&mut self, event: impl FnOnce() -> KvEvent) {
        if self.0.is_empty() {
            return;
        }
        let event = event();
        self.0.retain(|(sender, waiting)| waiting.one_more() && sender.send(event.clone()).is_ok());
    }
}
