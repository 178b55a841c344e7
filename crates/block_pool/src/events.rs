//! KV events: they inform a router of the prefixes that a pool has cached.

use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::Duration;

use crate::{BlockId, GroupBlock, PrefixKey, SaltFrom};

/// A change of what the pool has cached. A receiver that applies all events in order rebuilds the pool's prefix tree.
///
/// With the feature `serde` an event can be serialised.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(tag = "event", rename_all = "snake_case"))]
#[non_exhaustive]
pub enum KvEvent {
    /// A full block became cached: it is found by its tokens and salts and those of its ancestors. In a pool with several groups,
    /// the tokens are found when the blocks of all groups that the next token sees are cached.
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
    live: Receiver<KvEvent>,
}

impl KvEvents {
    pub(crate) fn new(past: Vec<KvEvent>, live: Receiver<KvEvent>) -> Self {
        Self { past: past.into_iter(), live }
    }

    /// Waits for the next event and returns it.
    ///
    /// # Errors
    ///
    /// [`RecvError`] when the pool has been dropped.
    pub fn recv(&mut self) -> Result<KvEvent, RecvError> {
        self.past.next().map_or_else(|| self.live.recv(), Ok)
    }

    /// Waits for the next event for at most this long.
    ///
    /// # Errors
    ///
    /// [`RecvTimeoutError`] when there is none until then, or the pool has been dropped.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<KvEvent, RecvTimeoutError> {
        self.past.next().map_or_else(|| self.live.recv_timeout(timeout), Ok)
    }

    /// Returns the next event, if there is one now.
    ///
    /// # Errors
    ///
    /// [`TryRecvError`] when there is none now, or the pool has been dropped.
    pub fn try_recv(&mut self) -> Result<KvEvent, TryRecvError> {
        self.past.next().map_or_else(|| self.live.try_recv(), Ok)
    }

    /// The events that have arrived by now.
    pub fn try_iter(&mut self) -> impl Iterator<Item = KvEvent> {
        std::iter::from_fn(|| self.try_recv().ok())
    }
}

impl Iterator for KvEvents {
    type Item = KvEvent;

    fn next(&mut self) -> Option<KvEvent> {
        self.recv().ok()
    }
}

/// The subscribers. While there are none, no event is built and nothing is allocated.
#[derive(Debug, Default)]
pub(crate) struct Subscribers(Vec<Sender<KvEvent>>);

impl Subscribers {
    /// Adds a subscriber.
    pub(crate) fn add(&mut self) -> Receiver<KvEvent> {
        let (sender, receiver) = channel();
        self.0.push(sender);
        receiver
    }

    /// Sends the event to every subscriber; those whose receiver was dropped are removed.
    #[inline]
    pub(crate) fn publish(&mut self, event: impl FnOnce() -> KvEvent) {
        if self.0.is_empty() {
            return;
        }
        let event = event();
        self.0.retain(|subscriber| subscriber.send(event.clone()).is_ok());
    }
}
