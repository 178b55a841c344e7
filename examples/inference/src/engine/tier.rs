//! What is below the cache: a sequence starts with what is there.
//!
//! A thread reads, piece after piece, while others decode. Before a step, what it has read is copied into the pool. A
//! sequence waits for its pieces no longer than it would take to compute them, and so for its turn no longer than it would
//! if those before it were computed.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use paged_attention::{BlockTable, FetchLimits, FetchedPrefix, SequenceId, Tier};

/// How many bytes are read at a time. Up to three pieces are in memory.
const PIECE: usize = 16 << 20;

/// The most bytes that are copied into the pool before a step, so that sequences that decode do not wait long.
const BYTES_PER_STEP: usize = 64 << 20;

/// How many tokens a second are computed, as long as that was not measured: more than a processor does.
const ASSUMED_RATE: f64 = 1000.0;

/// Whether a sequence loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loading {
    /// Nobody has asked the tier yet.
    Unasked,
    /// The tier seems to have some of its tokens: it waits for them, or for its turn.
    Waits,
    /// It is computed.
    No,
}

/// What is read from a tier, for one sequence after the other.
#[derive(Debug)]
pub(super) struct Loads {
    tier: Arc<dyn Tier>,
    current: Option<Load>,
    /// A thread that was not waited for. As long as it has not ended, the tier is not asked.
    stalled: Option<JoinHandle<()>>,
    /// What may still be copied before this step.
    bytes_left: usize,
    /// Tokens that sequences have gained.
    pub(super) tokens: usize,
    /// The time from the beginning of each load to its end.
    pub(super) time: Duration,
}

/// What is read for one sequence.
#[derive(Debug)]
struct Load {
    id: SequenceId,
    pieces: Receiver<FetchedPrefix>,
    thread: JoinHandle<()>,
    /// A piece that was waited for.
    waiting: Option<FetchedPrefix>,
    /// How many tokens the table has, if nobody else has added any.
    len: usize,
    started: Instant,
    /// How long it would take to compute what is read, and until when the next piece is waited for.
    patience: Duration,
    until: Instant,
}

impl Loads {
    pub(super) fn new(tier: Arc<dyn Tier>) -> Self {
        Self { tier, current: None, stalled: None, bytes_left: 0, tokens: 0, time: Duration::ZERO }
    }

    /// To be called before a step, with the sequences that load.
    pub(super) fn begin_step(&mut self, mut loading: impl Iterator<Item = SequenceId>) {
        self.bytes_left = BYTES_PER_STEP;
        if self.current.as_ref().is_some_and(|load| loading.all(|id| id != load.id)) {
            self.end();
        }
    }

    /// Adds to a table what has been read of its `tokens`. `rate` is how many of them would be computed in a second.
    /// Returns whether the sequence waits for more.
    pub(super) fn advance(
        &mut self,
        id: SequenceId,
        loading: Loading,
        table: &mut BlockTable,
        tokens: &[u32],
        rate: Option<f64>,
    ) -> Loading {
        if loading == Loading::No || (loading == Loading::Unasked && self.lookup(table, tokens) == 0) {
            return Loading::No;
        }
        loop {
            if self.current.is_none() {
                let patience = self.lookup(table, tokens) as f64 / rate.unwrap_or(ASSUMED_RATE);
                self.current = start(&self.tier, id, table, tokens, Duration::from_secs_f64(patience));
            }
            let Some(load) = &mut self.current else { return Loading::No };
            if load.id != id || self.bytes_left == 0 {
                return Loading::Waits;
            }
            let piece = match load.waiting.take().map_or_else(|| load.pieces.try_recv(), Ok) {
                Ok(piece) => piece,
                Err(TryRecvError::Empty) if Instant::now() < load.until => return Loading::Waits,
                Err(error) => {
                    let thread = self.end();
                    if error == TryRecvError::Empty {
                        self.stalled = thread;
                    }
                    return Loading::No;
                }
            };
            // Another sequence has computed the same meanwhile: what comes after that is read.
            if table.len() != load.len {
                self.end();
                continue;
            }
            // What does not fit, or cannot be written, is computed.
            let inserted = table.insert(&piece).unwrap_or(0);
            self.tokens += inserted;
            self.bytes_left = self.bytes_left.saturating_sub(piece.bytes());
            (load.len, load.until) = (table.len(), Instant::now() + load.patience);
            if inserted == 0 {
                self.end();
                return Loading::No;
            }
        }
    }

    /// How many tokens more the tier seems to have; 0 while a thread waits for it in vain.
    fn lookup(&self, table: &BlockTable, tokens: &[u32]) -> usize {
        match &self.stalled {
            Some(thread) if !thread.is_finished() => 0,
            _ => table.lookup_tier(&*self.tier, tokens).saturating_sub(table.len()),
        }
    }

    /// Waits for the next piece, if there is nothing else to do.
    pub(super) fn wait(&mut self) {
        let Some(load) = &mut self.current else { return };
        match load.pieces.recv_timeout(load.until.saturating_duration_since(Instant::now())) {
            Ok(piece) => load.waiting = Some(piece),
            // `advance` finds the same, and ends it.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
    }

    /// Ends the load. Its thread ends when it has read a piece, and nobody takes it.
    fn end(&mut self) -> Option<JoinHandle<()>> {
        let load = self.current.take()?;
        self.time += load.started.elapsed();
        Some(load.thread)
    }
}

/// Begins to read for a sequence, for as long as `patience`. `None` if that is nothing, or if there is no thread for it.
fn start(tier: &Arc<dyn Tier>, id: SequenceId, table: &BlockTable, tokens: &[u32], patience: Duration) -> Option<Load> {
    if patience.is_zero() {
        return None;
    }
    let started = Instant::now();
    let mut reader = table.prefix_reader(tokens);
    let (sender, pieces) = sync_channel(1);
    let tier = tier.clone();
    let read = move || {
        // Only reading counts, and not the time until a piece is taken.
        let mut left = patience;
        loop {
            let (begun, limits) = (Instant::now(), FetchLimits::default().max_time(left));
            let mut piece = reader.read(&*tier, &limits.max_bytes(PIECE));
            if piece.is_empty() && piece.has_more() {
                // Only a longer prefix is of use: its windows are there, and not those of shorter ones.
                piece = reader.read(&*tier, &limits);
            }
            left = left.saturating_sub(begun.elapsed());
            // There is no more, or the sequence does not wait any more.
            if piece.is_empty() || sender.send(piece).is_err() {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("load".into()).spawn(read).ok()?;
    Some(Load { id, pieces, thread, waiting: None, len: table.len(), started, patience, until: started + patience })
}
