//! Publishing over ZeroMQ: a PUB socket for what happens, and a ROUTER socket for what a subscriber has missed.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use block_pool::{BlockPool, KvEvents};
use bytes::Bytes;
use thiserror::Error;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqError, ZmqMessage};

use crate::Translator;
use crate::wire::{EventBatch, Medium};

/// How long a stopped publisher may take to notice it.
const PATIENCE: Duration = Duration::from_millis(50);
/// The most events of a batch.
const MOST_EVENTS: usize = 1024;
/// The sequence number that ends a replay, as vLLM's.
const END: [u8; 8] = (-1i64).to_be_bytes();

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
    #[error("cannot start a thread to publish events")]
    Thread(#[from] io::Error),
}

/// Publishes the events of a pool until it is dropped, or until the pool is.
///
/// Each message of the PUB socket has three frames, as vLLM's: the topic, a sequence number of 8 bytes (big endian, from
/// 0 on), and an [`EventBatch`] in MessagePack. A subscriber that sees a gap in the numbers asks the ROUTER socket to
/// replay: an empty frame and the first number it wants. Each answer has an empty frame, the topic, the number and the
/// batch; the last one has the number -1 and no batch.
///
/// The first batches have what is cached when publishing starts. A subscriber that connects later has missed them, and
/// asks for a replay from 0 on.
#[derive(Debug)]
pub struct Publisher {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    endpoint: String,
    replay_endpoint: Option<String>,
}

/// How a [`Publisher`] publishes.
#[derive(Debug, Clone)]
pub struct PublisherBuilder {
    endpoint: String,
    replay_endpoint: Option<String>,
    topic: String,
    medium: Medium,
    rank: Option<u32>,
    buffered: usize,
}

impl PublisherBuilder {
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

    /// Sets how many batches are kept for replays: 10,000 by default, as in vLLM.
    #[must_use]
    pub fn buffered_batches(self, batches: usize) -> Self {
        Self { buffered: batches, ..self }
    }

    /// Starts to publish what `pool` has cached, and what changes from now on.
    ///
    /// # Errors
    ///
    /// [`PublishError`] when an endpoint cannot be bound, or a thread cannot be started.
    pub fn start(self, pool: &BlockPool) -> Result<Publisher, PublishError> {
        let (sender, batches) = unbounded_channel();
        let (bound, endpoints) = mpsc::channel();
        let (rank, medium) = (self.rank, self.medium);
        let sockets = thread::Builder::new().name("kv-events-zmq".into()).spawn(move || self.serve(batches, &bound))?;
        // The thread sends once, or it has panicked.
        let endpoints = endpoints.recv().unwrap_or_else(|_| Err(io::Error::other("the thread has ended").into()));
        let (endpoint, replay_endpoint) = endpoints?;
        let (events, translator) = (pool.subscribe(), Translator::of(pool).medium(medium));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let reader = thread::Builder::new()
            .name("kv-events".into())
            .spawn(move || read(events, translator, rank, &stopped, &sender))?;
        Ok(Publisher { stop, threads: vec![reader, sockets], endpoint, replay_endpoint })
    }

    /// Binds the sockets, says so or why not, and sends until there are no more batches.
    fn serve(self, batches: UnboundedReceiver<Vec<u8>>, bound: &mpsc::Sender<Result<Endpoints, PublishError>>) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(bound.send(Err(error.into()))),
        };
        runtime.block_on(async {
            let (publish, replay, endpoints) = match self.bind().await {
                Ok(sockets) => sockets,
                Err(error) => return drop(bound.send(Err(error))),
            };
            // The receiver waits for this.
            let _ = bound.send(Ok(endpoints));
            let sent = Sent { topic: self.topic.into(), first: 0, batches: VecDeque::new(), most: self.buffered };
            sent.run(publish, replay, batches).await;
        });
    }

    async fn bind(&self) -> Result<(PubSocket, Option<RouterSocket>, Endpoints), PublishError> {
        let failed = |endpoint: &str| {
            let endpoint = endpoint.to_owned();
            move |error| PublishError::Bind { endpoint, error }
        };
        let mut publish = PubSocket::new();
        let endpoint = publish.bind(&self.endpoint).await.map_err(failed(&self.endpoint))?.to_string();
        let (mut replay, mut replay_endpoint) = (None, None);
        if let Some(wanted) = &self.replay_endpoint {
            let mut router = RouterSocket::new();
            replay_endpoint = Some(router.bind(wanted).await.map_err(failed(wanted))?.to_string());
            replay = Some(router);
        }
        Ok((publish, replay, (endpoint, replay_endpoint)))
    }
}

/// The endpoints of both sockets, with the ports that they have got.
type Endpoints = (String, Option<String>);

impl Publisher {
    /// Publishes at this endpoint, for example `tcp://*:5557`; with the port 0 the system chooses one.
    pub fn builder(endpoint: impl Into<String>) -> PublisherBuilder {
        PublisherBuilder {
            endpoint: endpoint.into(),
            replay_endpoint: None,
            topic: String::new(),
            medium: Medium::Gpu,
            rank: None,
            buffered: 10_000,
        }
    }

    /// Where subscribers connect.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where they ask for a replay.
    pub fn replay_endpoint(&self) -> Option<&str> {
        self.replay_endpoint.as_deref()
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

/// Translates events, and passes them on in batches.
fn read(
    mut events: KvEvents,
    mut translator: Translator,
    rank: Option<u32>,
    stop: &AtomicBool,
    batches: &UnboundedSender<Vec<u8>>,
) {
    while !stop.load(Ordering::Relaxed) {
        let first = match events.recv_timeout(PATIENCE) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let translated = translator.translate(std::iter::once(first).chain(events.try_iter().take(MOST_EVENTS - 1)));
        if translated.is_empty() {
            continue;
        }
        let batch = EventBatch { data_parallel_rank: rank, ..EventBatch::now(translated) };
        if batches.send(batch.encode()).is_err() {
            return;
        }
    }
}

/// What was sent, for replays.
struct Sent {
    topic: Bytes,
    /// The sequence number of the first batch that is kept.
    first: u64,
    batches: VecDeque<Bytes>,
    most: usize,
}

impl Sent {
    async fn run(
        mut self,
        mut publish: PubSocket,
        mut replay: Option<RouterSocket>,
        mut batches: UnboundedReceiver<Vec<u8>>,
    ) {
        loop {
            let request = async {
                match &mut replay {
                    Some(router) => router.recv().await,
                    None => std::future::pending().await,
                }
            };
            let request = tokio::select! {
                batch = batches.recv() => match batch {
                    Some(batch) => {
                        self.publish(&mut publish, batch.into()).await;
                        continue;
                    }
                    None => return,
                },
                request = request => request,
            };
            if let (Ok(request), Some(router)) = (request, &mut replay) {
                self.replay(router, &request.into_vec()).await;
            }
        }
    }

    async fn publish(&mut self, socket: &mut PubSocket, batch: Bytes) {
        let sequence = self.first + self.batches.len() as u64;
        self.batches.push_back(batch.clone());
        if self.batches.len() > self.most {
            self.batches.pop_front();
            self.first += 1;
        }
        let frames = vec![self.topic.clone(), Bytes::copy_from_slice(&sequence.to_be_bytes()), batch];
        send(socket, frames).await;
    }

    /// Answers a request: the identity of who asks, an empty frame, and the first sequence number that is wanted.
    async fn replay(&self, socket: &mut RouterSocket, request: &[Bytes]) {
        let [identity, _, start] = request else { return };
        let Some(start) = start.first_chunk().map(|start| u64::from_be_bytes(*start)) else { return };
        let answer = |topic: &Bytes, sequence: [u8; 8], batch: &Bytes| {
            let sequence = Bytes::copy_from_slice(&sequence);
            vec![identity.clone(), Bytes::new(), topic.clone(), sequence, batch.clone()]
        };
        let skipped = usize::try_from(start.saturating_sub(self.first)).unwrap_or(usize::MAX);
        for (sequence, batch) in (self.first..).zip(&self.batches).skip(skipped) {
            send(socket, answer(&self.topic, sequence.to_be_bytes(), batch)).await;
        }
        send(socket, answer(&Bytes::new(), END, &Bytes::new())).await;
    }
}

/// Sends a message. One that cannot be sent, because the peer has gone or does not keep up, is lost: the peer sees a gap
/// in the sequence numbers.
async fn send(socket: &mut impl SocketSend, frames: Vec<Bytes>) {
    // A message without frames does not exist; these have some.
    let Ok(message) = ZmqMessage::try_from(frames) else { return };
    if let Err(error) = socket.send(message).await {
        tracing::debug!(%error, "events could not be sent");
    }
}
