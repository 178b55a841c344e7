//! What a router has to know: which prefixes this pool holds.

use std::sync::mpsc::{Receiver, Sender, channel};

use crate::{BlockId, Salt};

/// A change of what the pool remembers. Applied in order, events rebuild the pool's prefix tree elsewhere.
///
/// With the feature `serde` an event can be serialised.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(tag = "event", rename_all = "snake_case"))]
pub enum PoolEvent {
    /// A full block can be found from now on, by its tokens and those of its ancestors.
    Stored {
        /// The block.
        block: BlockId,
        /// The block before it, stored earlier; none for the first block of a prefix.
        parent: Option<BlockId>,
        /// Its tokens, as many as a block holds.
        tokens: Vec<u32>,
        /// The salt of the prefix.
        salt: Salt,
    },
    /// The block cannot be found any more. Its children were removed before it.
    Removed {
        /// The block.
        block: BlockId,
    },
    /// Nothing can be found any more.
    Cleared,
}

/// Those who listen. Nothing is built, and nothing allocated, while there are none.
#[derive(Debug, Default)]
pub(crate) struct Listeners(Vec<Sender<PoolEvent>>);

impl Listeners {
    /// One more listener, whose stream begins with `past`.
    pub(crate) fn add(&mut self, past: impl IntoIterator<Item = PoolEvent>) -> Receiver<PoolEvent> {
        let (sender, receiver) = channel();
        for event in past {
            // The receiver is alive: it is in this function's hands.
            let _ = sender.send(event);
        }
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
