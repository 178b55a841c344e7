//! What a router has to know: which prefixes this pool holds.

use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError, channel};

use crate::{BlockId, PrefixKey};

/// A change of what the pool has cached. Applied in order, events rebuild the pool's prefix tree elsewhere.
///
/// With the feature `serde` an event can be serialised.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(tag = "event", rename_all = "snake_case"))]
#[non_exhaustive]
pub enum PoolEvent {
    /// A full block can be found from now on, by its tokens and those of its ancestors.
    Stored {
        /// The block.
        block: BlockId,
        /// The block before it, stored earlier; none for the first block of a prefix.
        parent: Option<BlockId>,
        /// Its tokens, as many as a block holds. At the beginning of a stream these may follow the tokens of blocks after
        /// `parent` that were removed before the stream began: then there are several blocks of tokens, of which the last is
        /// this block's.
        tokens: Vec<u32>,
        /// What must match beside the tokens.
        key: PrefixKey,
    },
    /// The block is not there any more. Its place among its tokens stays known as long as another block follows it, which
    /// sequences with a window may still find.
    Removed {
        /// The block.
        block: BlockId,
    },
    /// Nothing can be found any more.
    Cleared,
}

/// A stream of [`PoolEvent`]s; see [`BlockPool::listen`](crate::BlockPool::listen). As an iterator it waits for the next
/// event, and ends when the pool does.
#[derive(Debug)]
pub struct PoolEvents {
    past: std::vec::IntoIter<PoolEvent>,
    live: Receiver<PoolEvent>,
}

impl PoolEvents {
    pub(crate) fn new(past: Vec<PoolEvent>, live: Receiver<PoolEvent>) -> Self {
        Self { past: past.into_iter(), live }
    }

    /// The next event, waiting for it.
    ///
    /// # Errors
    ///
    /// [`RecvError`] when the pool is gone.
    pub fn recv(&mut self) -> Result<PoolEvent, RecvError> {
        self.past.next().map_or_else(|| self.live.recv(), Ok)
    }

    /// The next event, if there is one now.
    ///
    /// # Errors
    ///
    /// [`TryRecvError`] when there is none now, or the pool is gone.
    pub fn try_recv(&mut self) -> Result<PoolEvent, TryRecvError> {
        self.past.next().map_or_else(|| self.live.try_recv(), Ok)
    }

    /// The events that there are now.
    pub fn try_iter(&mut self) -> impl Iterator<Item = PoolEvent> {
        std::iter::from_fn(|| self.try_recv().ok())
    }
}

impl Iterator for PoolEvents {
    type Item = PoolEvent;

    fn next(&mut self) -> Option<PoolEvent> {
        self.recv().ok()
    }
}

/// Those who listen. Nothing is built, and nothing allocated, while there are none.
#[derive(Debug, Default)]
pub(crate) struct Listeners(Vec<Sender<PoolEvent>>);

impl Listeners {
    /// One more listener.
    pub(crate) fn add(&mut self) -> Receiver<PoolEvent> {
        let (sender, receiver) = channel();
        self.0.push(sender);
        receiver
    }

    /// Tells everybody; those whose receiver is gone are forgotten.
    #[inline]
    pub(crate) fn tell(&mut self, event: impl FnOnce() -> PoolEvent) {
        if self.0.is_empty() {
            return;
        }
        let event = event();
        self.0.retain(|listener| listener.send(event.clone()).is_ok());
    }
}
