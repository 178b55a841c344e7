//! What is below the cache: a sequence starts with what is there.
//!
//! A thread reads, piece after piece, while others decode. Before a step, what it has read is copied into the pool. A
//! sequence waits for its pieces no longer than it would take to compute them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use paged_attention::{BlockTable, FetchLimits, FetchedPrefix, SequenceId, Tier};

/// How many bytes are read at a time. Up to three pieces are in memory.
const PIECE: usize = 16 << 20;

/// The most bytes that are copied into the pool before a step, so that sequences that decode do not wait long.
const BYTES_PER_STEP: usize = 64 << 20;

/// How many tokens a second are computed, as long as that was not measured: more than a processor does.
const ASSUMED_RATE: f64 = 1000.0;

/// What is read from a tier, for one sequence after the other.
#[derive(Debug)]
pub(super) struct Loads {
    tier: Arc<dyn Tier>,
    current: Option<Load>,
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
    /// A piece that was waited for.
    waiting: Option<FetchedPrefix>,
    /// How many tokens the table has, if nobody else has added any.
    len: usize,
    started: Instant,
    until: Instant,
}

impl Loads {
    pub(super) fn new(tier: Arc<dyn Tier>) -> Self {
        Self { tier, current: None, bytes_left: 0, tokens: 0, time: Duration::ZERO }
    }

    /// To be called before a step, with the sequences that may load.
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
        table: &mut BlockTable,
        tokens: &[u32],
        rate: Option<f64>,
    ) -> bool {
        loop {
            if self.current.is_none() {
                self.current = start(&self.tier, id, table, tokens, rate);
            }
            let Some(load) = &mut self.current else { return false };
            if load.id != id || self.bytes_left == 0 {
                return true;
            }
            let piece = match load.waiting.take().map_or_else(|| load.pieces.try_recv(), Ok) {
                Ok(piece) => piece,
                Err(TryRecvError::Empty) if Instant::now() < load.until => return true,
                Err(_) => {
                    self.end();
                    return false;
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
            load.len = table.len();
            if inserted == 0 {
                self.end();
                return false;
            }
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

    fn end(&mut self) {
        if let Some(load) = self.current.take() {
            self.time += load.started.elapsed();
        }
    }
}

/// Begins to read for a sequence, if the tier seems to have anything.
fn start(tier: &Arc<dyn Tier>, id: SequenceId, table: &BlockTable, tokens: &[u32], rate: Option<f64>) -> Option<Load> {
    let started = Instant::now();
    let mut reader = table.prefix_reader(tokens);
    let found = reader.lookup(&**tier).saturating_sub(table.len());
    if found == 0 {
        return None;
    }
    let until = started + Duration::from_secs_f64(found as f64 / rate.unwrap_or(ASSUMED_RATE));
    let (sender, pieces) = sync_channel(1);
    let tier = tier.clone();
    let read = move || {
        loop {
            let limits = FetchLimits::default().max_bytes(PIECE);
            let limits = limits.max_time(until.saturating_duration_since(Instant::now()));
            let piece = reader.read(&*tier, &limits);
            // There is no more, or the sequence does not wait any more.
            if piece.is_empty() || sender.send(piece).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name("load".into()).spawn(read).ok()?;
    Some(Load { id, pieces, waiting: None, len: table.len(), started, until })
}
