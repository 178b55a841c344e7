//! The router: Dynamo's decoder and index, fed as its listener does.

use std::collections::HashMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use dynamo_kv_router::indexer::WorkerTask;
use dynamo_kv_router::protocols::{BlockHashOptions, KvCacheEventData, RouterEvent, WorkerWithDpRank};
use dynamo_kv_router::zmq_wire::{ZmqEventNormalizer, decode_event_batch};
use dynamo_kv_router::{
    LowerTierContinuation, LowerTierIndexer, RadixTree, SyncIndexer as _, compute_block_hash_for_seq,
};
use kv_events::Publisher;
use tokio::sync::oneshot;
use tokio::time::timeout;
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

use crate::BLOCK_SIZE;

/// How long a message may take that has to come.
const PATIENCE: Duration = Duration::from_secs(10);

/// Which prefixes the engines have cached, as the router sees it.
pub struct Index {
    normalizer: ZmqEventNormalizer,
    tree: RadixTree,
    disk: Disk,
}

/// What the engines have on their disks, in the router's index of lower tiers, which has a thread.
struct Disk {
    index: Arc<LowerTierIndexer>,
    tasks: flume::Sender<WorkerTask>,
}

impl Default for Disk {
    fn default() -> Self {
        let (index, (tasks, todo)) = (Arc::new(LowerTierIndexer::new()), flume::unbounded());
        let worker = index.clone();
        // It ends when there are no more senders.
        std::thread::spawn(move || drop(worker.worker(todo, None)));
        Self { index, tasks }
    }
}

impl Disk {
    fn apply(&self, event: RouterEvent) -> Result<(), Box<dyn Error>> {
        let (resp, applied) = oneshot::channel();
        self.tasks.send(WorkerTask::EventWithAck { event, resp })?;
        let mut applied = applied;
        loop {
            match applied.try_recv() {
                Ok(true) => return Ok(()),
                Ok(false) => return Err("the index of lower tiers refuses an event".into()),
                Err(oneshot::error::TryRecvError::Empty) => std::thread::yield_now(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Index")
    }
}

impl Default for Index {
    fn default() -> Self {
        Self { normalizer: ZmqEventNormalizer::new(BLOCK_SIZE as u32), tree: RadixTree::new(), disk: Disk::default() }
    }
}

impl Index {
    /// Applies a batch of an engine.
    ///
    /// # Errors
    ///
    /// When the router cannot decode it, filters an event out, or has no place for it.
    pub fn apply(&mut self, engine: u64, sequence: u64, payload: &[u8]) -> Result<(), Box<dyn Error>> {
        let worker = WorkerWithDpRank { worker_id: engine, dp_rank: 0 };
        for raw in decode_event_batch(payload)?.events {
            let raw = self.normalizer.preprocess_with_reason(raw, worker).map_err(|reason| reason.as_label())?;
            let placed = self.normalizer.normalize_preprocessed(raw, sequence, worker).ok_or("not converted")?;
            let event = placed.into_router_event().ok_or("not of an engine")?;
            let is_cleared = matches!(event.event.data, KvCacheEventData::Cleared);
            if is_cleared || !event.storage_tier.is_gpu() {
                self.disk.apply(event.clone())?;
            }
            if is_cleared || event.storage_tier.is_gpu() {
                self.tree.apply_event(event)?;
            }
        }
        Ok(())
    }

    /// How many blocks of a prompt each engine has, of those that have any.
    pub fn blocks(&self, prompt: &[u32], namespace: Option<&str>) -> HashMap<u64, usize> {
        let options = BlockHashOptions { cache_namespace: namespace, ..Default::default() };
        let hashes = compute_block_hash_for_seq(prompt, BLOCK_SIZE as u32, options);
        let matches = self.tree.find_matches(hashes, false);
        matches.scores.into_iter().map(|(worker, blocks)| (worker.worker_id, blocks as usize)).collect()
    }
}

impl Index {
    /// How many blocks at the start of a prompt an engine has on its disk.
    pub fn blocks_on_disk(&self, prompt: &[u32], engine: u64) -> usize {
        let hashes = compute_block_hash_for_seq(prompt, BLOCK_SIZE as u32, BlockHashOptions::default());
        let worker = WorkerWithDpRank { worker_id: engine, dp_rank: 0 };
        let from = HashMap::from([(worker, LowerTierContinuation::from_root(0))]);
        self.disk.index.query_contiguous_hits(&hashes, &from).get(&worker).copied().unwrap_or(0)
    }
}

/// Follows one engine: reads its events, and asks for those that it has missed.
pub struct Follower {
    engine: u64,
    live: SubSocket,
    replay: DealerSocket,
    /// The sequence number of the next batch.
    next: u64,
    /// How many batches were replayed.
    pub replayed: usize,
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower").field("engine", &self.engine).field("next", &self.next).finish_non_exhaustive()
    }
}

impl Follower {
    /// Connects to an engine.
    ///
    /// # Errors
    ///
    /// When there is nothing to connect to.
    pub async fn connect(engine: u64, publisher: &Publisher) -> Result<Self, Box<dyn Error>> {
        let mut live = SubSocket::new();
        timeout(PATIENCE, live.connect(publisher.endpoint())).await??;
        timeout(PATIENCE, live.subscribe("")).await??;
        let mut replay = DealerSocket::new();
        timeout(PATIENCE, replay.connect(publisher.replay_endpoint().ok_or("no replay")?)).await??;
        Ok(Self { engine, live, replay, next: 0, replayed: 0 })
    }

    /// Reads and drops what arrives until nothing comes for a while, as if the network lost it. Returns how many
    /// batches that were.
    ///
    /// # Errors
    ///
    /// When the connection breaks.
    pub async fn lose(&mut self, silence: Duration) -> Result<usize, Box<dyn Error>> {
        let mut lost = 0;
        while let Ok(message) = timeout(silence, self.live.recv()).await {
            message?;
            lost += 1;
        }
        Ok(lost)
    }

    /// Applies what arrives until nothing comes for a while. Where sequence numbers are missing, it asks for a replay.
    ///
    /// # Errors
    ///
    /// When the connection breaks, or the index refuses a batch.
    pub async fn follow(&mut self, index: &mut Index, silence: Duration) -> Result<(), Box<dyn Error>> {
        while let Ok(message) = timeout(silence, self.live.recv()).await {
            let [_topic, sequence, payload] = &message?.into_vec()[..] else { return Err("not three frames".into()) };
            let sequence = u64::from_be_bytes(sequence[..].try_into()?);
            if sequence > self.next {
                self.catch_up(index).await?;
            }
            if sequence >= self.next {
                index.apply(self.engine, sequence, payload)?;
                self.next = sequence + 1;
            }
        }
        Ok(())
    }

    /// Asks for all batches from the next one on, and applies them. If the first of them are not kept any more, the
    /// engine begins again on the other socket.
    ///
    /// # Errors
    ///
    /// As [`follow`](Self::follow), and when the answer does not end.
    pub async fn catch_up(&mut self, index: &mut Index) -> Result<(), Box<dyn Error>> {
        let mut request = ZmqMessage::from(self.next.to_be_bytes().to_vec());
        request.push_front(Vec::new().into());
        self.replay.send(request).await?;
        let mut complete = true;
        loop {
            let answer = timeout(PATIENCE, self.replay.recv()).await??.into_vec();
            let [_, _topic, sequence, payload] = &answer[..] else { return Err("not four frames".into()) };
            // As the router's own listener, which does not look at the number of the end.
            if payload.is_empty() {
                return Ok(());
            }
            let sequence = u64::from_be_bytes(sequence[..].try_into()?);
            complete &= sequence == self.next;
            self.next = sequence + 1;
            self.replayed += 1;
            // What follows a gap makes no sense by itself: parents may be unknown.
            let applied = index.apply(self.engine, sequence, payload);
            if complete {
                applied?;
            }
        }
    }
}
