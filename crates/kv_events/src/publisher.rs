//! Publishing the events of a pool from threads of its own: one reads and translates them, one serves the sockets.

mod sent;
mod sockets;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use block_pool::{BlockPool, KvEvents};
use thiserror::Error;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use zeromq::ZmqError;

use crate::wire::{Event, EventBatch, Medium};
use crate::{PublishedTier, Translator};
use sent::Sent;
use sockets::{Endpoints, Sockets};

/// How long a stopped publisher may take to notice it.
const PATIENCE: Duration = Duration::from_millis(50);
/// The most events of a batch.
const MOST_EVENTS: usize = 1024;
/// The most events of the pool that wait for this publisher. When there are more, it begins again with what is cached
/// then. With blocks of 16 tokens they take up to 20 MB.
const MOST_WAITING: usize = 1 << 16;
/// The most batches between the two threads. The first one waits when there are more, and events wait in the pool.
const MOST_BATCHES: usize = 16;

/// Why publishing cannot start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PublishError {
    /// An endpoint cannot be bound.
    #[error("cannot bind {endpoint}: {error}")]
    Bind {
        /// The endpoint.
        endpoint: String,
        /// Why.
        error: ZmqError,
    },
    /// A thread or its runtime cannot be started.
    #[error("cannot start a thread to publish events: {0}")]
    Thread(#[from] io::Error),
}

/// Publishes the events of a pool until it is dropped, or until the pool is.
///
/// Each message of the PUB socket has three frames, as vLLM's: the topic, a sequence number of 8 bytes (big endian,
/// from 0 on), and an [`EventBatch`] in MessagePack. A subscriber that sees a gap in the numbers asks the ROUTER socket
/// to replay: an empty frame and the first number it wants. Each answer has an empty frame, the topic, the number and
/// the batch; the last one has the number -1 and no batch.
///
/// The first batches have what is cached when publishing starts. A subscriber that connects later has missed them, and
/// asks for a replay from 0 on. When a replay no longer has the first batch that was asked for, the publisher begins
/// again on the PUB socket: [`AllBlocksCleared`](crate::Event::AllBlocksCleared), and then all that is cached. So every
/// subscriber that asks gets the right contents in the end. The publisher does the same when it cannot keep up with the
/// pool: events never wait in more memory than some 20 MB, and never make the pool wait.
///
/// Up to 100,000 messages wait for a subscriber that reads slowly; then it loses some, and sees a gap. Sockets have no
/// authentication: an endpoint is for a network of routers and engines that trust one another.
#[derive(Debug)]
pub struct Publisher {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    endpoints: Endpoints,
}

/// How a [`Publisher`] publishes.
#[derive(Debug, Clone)]
pub struct PublisherBuilder {
    endpoint: String,
    replay_endpoint: Option<String>,
    topic: String,
    medium: Medium,
    rank: Option<u32>,
    most_batches: usize,
    most_bytes: usize,
    tier: Option<Arc<PublishedTier>>,
}

impl PublisherBuilder {
    /// Publishes what this tier has, too.
    #[must_use]
    pub fn tier(self, tier: Arc<PublishedTier>) -> Self {
        Self { tier: Some(tier), ..self }
    }

    /// Also answers requests for a replay, at this endpoint.
    #[must_use]
    pub fn replay_endpoint(self, endpoint: impl Into<String>) -> Self {
        Self { replay_endpoint: Some(endpoint.into()), ..self }
    }

    /// Sets the topic, which is empty by default. llm-d expects `kv@ADDRESS@MODEL`.
    #[must_use]
    pub fn topic(self, topic: impl Into<String>) -> Self {
        Self { topic: topic.into(), ..self }
    }

    /// Sets the medium, which is [`Medium::Gpu`] by default: what routers count as the engine's own memory.
    #[must_use]
    pub fn medium(self, medium: Medium) -> Self {
        Self { medium, ..self }
    }

    /// Sets the number of this engine among those behind one address.
    #[must_use]
    pub fn data_parallel_rank(self, rank: u32) -> Self {
        Self { rank: Some(rank), ..self }
    }

    /// Sets how many batches are kept for replays, at most: 10,000 by default, as in vLLM.
    #[must_use]
    pub fn buffered_batches(self, batches: usize) -> Self {
        Self { most_batches: batches, ..self }
    }

    /// Sets how many bytes of batches are kept for replays, at most: 64 MiB by default. A block of 16 tokens takes
    /// about 90.
    #[must_use]
    pub fn buffered_bytes(self, bytes: usize) -> Self {
        Self { most_bytes: bytes, ..self }
    }

    /// Starts to publish what `pool` has cached, and what changes from now on.
    ///
    /// # Errors
    ///
    /// [`PublishError`] when an endpoint cannot be bound, or a thread cannot be started.
    pub fn start(self, pool: &BlockPool) -> Result<Publisher, PublishError> {
        let (sender, batches) = channel(MOST_BATCHES);
        let (bound, endpoints) = mpsc::channel();
        let (rank, medium, tier) = (self.rank, self.medium, self.tier.clone());
        let again = Arc::new(AtomicBool::new(false));
        let asked = again.clone();
        let sockets =
            thread::Builder::new().name("kv-events-zmq".into()).spawn(move || serve(self, batches, &bound, &asked))?;
        // The thread sends once, or it has panicked.
        let endpoints = endpoints.recv().unwrap_or_else(|_| Err(io::Error::other("the thread has ended").into()))?;
        let (events, translator) = (pool.subscribe_within(MOST_WAITING), Translator::of(pool).medium(medium));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let reader = thread::Builder::new()
            .name("kv-events".into())
            .spawn(move || read(events, translator, tier.as_deref(), rank, &stopped, &again, &sender))?;
        Ok(Publisher { stop, threads: vec![reader, sockets], endpoints })
    }
}

impl Publisher {
    /// Publishes at this endpoint, for example `tcp://*:5557`; with the port 0 the system chooses one. `*` is every
    /// IPv4 address of this machine.
    pub fn builder(endpoint: impl Into<String>) -> PublisherBuilder {
        PublisherBuilder {
            endpoint: endpoint.into(),
            replay_endpoint: None,
            topic: String::new(),
            medium: Medium::Gpu,
            rank: None,
            most_batches: 10_000,
            most_bytes: 64 << 20,
            tier: None,
        }
    }

    /// Where subscribers connect, with the port that was chosen.
    pub fn endpoint(&self) -> &str {
        &self.endpoints.publish
    }

    /// Where they ask for a replay, if they can.
    pub fn replay_endpoint(&self) -> Option<&str> {
        self.endpoints.replay.as_deref()
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that has panicked has nothing more to say.
            let _ = thread.join();
        }
    }
}

/// Translates events, and passes them on in batches. Begins again when `again` is set.
fn read(
    mut events: KvEvents,
    mut translator: Translator,
    tier: Option<&PublishedTier>,
    rank: Option<u32>,
    stop: &AtomicBool,
    again: &AtomicBool,
    batches: &Sender<Vec<u8>>,
) {
    while !stop.load(Ordering::Relaxed) {
        if again.swap(false, Ordering::Relaxed) {
            events.begin_again();
        }
        let first = match events.recv_timeout(PATIENCE) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let more = if first.is_some() { MOST_EVENTS - 1 } else { 0 };
        let mut translated = translator.translate(first.into_iter().chain(events.try_iter().take(more)));
        if let Some(tier) = tier {
            // Routers have forgotten the tier, too.
            let is_cleared = translated.iter().any(|event| matches!(event, Event::AllBlocksCleared {}));
            match tier.take() {
                _ if is_cleared => translated.extend(tier.all()),
                Some(changes) => translated.extend(changes),
                None => again.store(true, Ordering::Relaxed),
            }
        }
        for events in translated.chunks(MOST_EVENTS) {
            let batch = EventBatch { data_parallel_rank: rank, ..EventBatch::now(events.to_vec()) };
            if batches.blocking_send(batch.encode()).is_err() {
                return;
            }
        }
    }
}

/// Binds the sockets, says so or why not, and sends until there are no more batches.
fn serve(
    options: PublisherBuilder,
    batches: Receiver<Vec<u8>>,
    bound: &mpsc::Sender<Result<Endpoints, PublishError>>,
    again: &AtomicBool,
) {
    // Nobody waits for the answer any more if it cannot be sent.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return drop(bound.send(Err(error.into()))),
    };
    runtime.block_on(async {
        let (sockets, endpoints) = match Sockets::bind(&options.endpoint, options.replay_endpoint.as_deref()).await {
            Ok(bound) => bound,
            Err(error) => return drop(bound.send(Err(error))),
        };
        if bound.send(Ok(endpoints)).is_ok() {
            let sent = Sent::new(options.most_batches, options.most_bytes);
            sockets.serve(options.topic.into(), sent, batches, again).await;
        }
    });
}
