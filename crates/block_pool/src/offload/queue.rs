//! What waits for the tier.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::WrittenThrough;
use crate::OffloadStats;
use crate::prefix::Lineage;

/// The most blocks that wait to be written through. Each takes some 40 bytes, and keeps the tokens before it.
const MOST_WRITTEN_THROUGH: usize = 1 << 16;

/// The blocks that wait for the tier. Evicted ones, which take memory, come first.
#[derive(Debug)]
pub(crate) struct Queue {
    max_staged_bytes: usize,
    writes_through: bool,
    state: Mutex<State>,
    /// Something has been added or done.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    evicted: VecDeque<Evicted>,
    written_through: VecDeque<WrittenThrough>,
    /// Memory of blocks that were stored, for the next ones, within the limit of what is staged.
    spare: Vec<Vec<u8>>,
    spare_bytes: usize,
    /// Whether the thread has taken something and not finished it.
    is_busy: bool,
    is_closed: bool,
    stats: OffloadStats,
}

/// The content of an evicted block.
#[derive(Debug)]
pub(crate) struct Evicted {
    pub(super) group: usize,
    pub(super) lineage: Arc<Lineage>,
    pub(super) bytes: Vec<u8>,
}

pub(super) enum Work {
    Evicted(Evicted),
    WrittenThrough(WrittenThrough),
}

/// What became of a block.
#[derive(Debug, Clone, Copy)]
pub(super) enum Done {
    Stored,
    Already,
    Failed,
    /// It was evicted before it could be written through.
    Gone,
}

impl Queue {
    pub(super) fn new(max_staged_bytes: usize, writes_through: bool) -> Self {
        Self { max_staged_bytes, writes_through, state: Mutex::default(), changed: Condvar::new() }
    }

    pub(crate) fn writes_through(&self) -> bool {
        self.writes_through
    }

    /// Room for the content of an evicted block of `bytes` bytes, if there is any.
    pub(crate) fn room_for(&self, bytes: usize) -> Option<Room<'_>> {
        let mut state = self.state();
        if state.is_closed {
            return None;
        }
        if bytes > self.max_staged_bytes - state.stats.staged_bytes {
            state.stats.dropped += 1;
            return None;
        }
        state.stats.staged_bytes += bytes;
        let spare = state.spare.pop().unwrap_or_default();
        state.spare_bytes -= spare.capacity();
        Some(Room { queue: self, size: bytes, bytes: spare })
    }

    pub(crate) fn add_written_through(&self, blocks: Vec<WrittenThrough>) {
        let mut state = self.state();
        if state.is_closed {
            return;
        }
        let room = MOST_WRITTEN_THROUGH - state.written_through.len();
        state.stats.skipped += blocks.len().saturating_sub(room) as u64;
        state.written_through.extend(blocks.into_iter().take(room));
        drop(state);
        self.changed.notify_all();
    }

    /// Waits for the next block; `None` when the queue is closed and empty.
    pub(super) fn next(&self) -> Option<Work> {
        let mut state = self.state();
        loop {
            let evicted = state.evicted.pop_front().map(Work::Evicted);
            let work = evicted.or_else(|| state.written_through.pop_front().map(Work::WrittenThrough));
            state.is_busy = work.is_some();
            if work.is_some() || state.is_closed {
                return work;
            }
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Counts what became of the last block, and takes the memory of its content if it was staged.
    pub(super) fn finish(&self, done: Done, staged: Option<Vec<u8>>) {
        let mut state = self.state();
        match done {
            Done::Stored => state.stats.stored += 1,
            Done::Already => state.stats.already += 1,
            Done::Failed => state.stats.failed += 1,
            Done::Gone => {}
        }
        if let Some(mut bytes) = staged {
            state.stats.staged_bytes -= bytes.len();
            bytes.clear();
            let spare_bytes = state.spare_bytes + bytes.capacity();
            if spare_bytes <= self.max_staged_bytes - state.stats.staged_bytes {
                state.spare.push(bytes);
                state.spare_bytes = spare_bytes;
            }
        }
    }

    /// Takes no more blocks. Those that wait are still stored.
    pub(super) fn close(&self) {
        self.state().is_closed = true;
        self.changed.notify_all();
    }

    /// Takes no more blocks, and forgets those that wait: the thread has ended.
    pub(super) fn abandon(&self) {
        let mut state = self.state();
        let State { evicted, written_through, spare, spare_bytes, is_busy, is_closed, stats } = &mut *state;
        stats.failed += (evicted.len() + written_through.len() + usize::from(*is_busy)) as u64;
        (*is_busy, *is_closed, stats.staged_bytes, *spare_bytes) = (false, true, 0, 0);
        let left = (std::mem::take(evicted), std::mem::take(written_through), std::mem::take(spare));
        drop(state);
        drop(left);
        self.changed.notify_all();
    }

    pub(super) fn wait_until_idle(&self) {
        let is_working =
            |state: &mut State| state.is_busy || !(state.evicted.is_empty() && state.written_through.is_empty());
        let state = self.changed.wait_while(self.state(), is_working);
        drop(state.unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn stats(&self) -> OffloadStats {
        let state = self.state();
        let waiting = state.evicted.len() + state.written_through.len() + usize::from(state.is_busy);
        OffloadStats { waiting, ..state.stats }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in it panics half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room in the staging buffer for one block. It is given back if it is not filled.
pub(crate) struct Room<'q> {
    queue: &'q Queue,
    size: usize,
    /// For the content; empty at first.
    pub(crate) bytes: Vec<u8>,
}

impl Room<'_> {
    /// Adds the block whose content the bytes have now.
    pub(crate) fn fill(mut self, group: usize, lineage: Arc<Lineage>) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut state = self.queue.state();
        if state.is_closed {
            // After the end of the thread nothing is counted as staged.
            state.stats.staged_bytes = state.stats.staged_bytes.saturating_sub(self.size);
        } else {
            state.evicted.push_back(Evicted { group, lineage, bytes });
        }
        drop(state);
        self.queue.changed.notify_all();
        std::mem::forget(self);
    }
}

/// The block could not be read.
impl Drop for Room<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.state();
        state.stats.staged_bytes = state.stats.staged_bytes.saturating_sub(self.size);
        state.stats.failed += 1;
    }
}
