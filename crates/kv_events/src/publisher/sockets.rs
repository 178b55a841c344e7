//! The two sockets: PUB for what happens, and ROUTER for what a subscriber has missed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc::Receiver;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqError, ZmqMessage};

use super::PublishError;
use super::sent::Sent;

/// The sequence number that ends a replay, as vLLM's.
const END: [u8; 8] = (-1i64).to_be_bytes();

/// Where the sockets are bound, with the ports that they have got.
#[derive(Debug)]
pub(super) struct Endpoints {
    pub(super) publish: String,
    pub(super) replay: Option<String>,
}

pub(super) struct Sockets {
    publish: PubSocket,
    replay: Option<RouterSocket>,
}

impl Sockets {
    pub(super) async fn bind(publish: &str, replay: Option<&str>) -> Result<(Self, Endpoints), PublishError> {
        let (publish, publish_endpoint) = bind::<PubSocket>(publish).await?;
        let (replay, replay_endpoint) = match replay {
            Some(endpoint) => {
                bind::<RouterSocket>(endpoint).await.map(|(socket, bound)| (Some(socket), Some(bound)))?
            }
            None => (None, None),
        };
        Ok((Self { publish, replay }, Endpoints { publish: publish_endpoint, replay: replay_endpoint }))
    }

    /// Sends batches, and answers requests, until there are no more batches. Sets `again` when a request is for batches
    /// that are not kept any more.
    pub(super) async fn serve(
        mut self,
        topic: Bytes,
        mut sent: Sent,
        mut batches: Receiver<Vec<u8>>,
        again: &AtomicBool,
    ) {
        loop {
            let request = async {
                match &mut self.replay {
                    Some(router) => router.recv().await,
                    None => std::future::pending().await,
                }
            };
            let request = tokio::select! {
                batch = batches.recv() => {
                    let Some(batch) = batch else { return };
                    let batch = Bytes::from(batch);
                    let sequence = sent.push(batch.clone()).to_be_bytes();
                    // It does not wait: what a slow subscriber has no room for is lost to it.
                    let frames = vec![topic.clone(), Bytes::copy_from_slice(&sequence), batch];
                    if let Err(error) = send(&mut self.publish, frames).await {
                        tracing::warn!(%error, "KV events could not be published");
                    }
                    continue;
                }
                request = request => request,
            };
            let (Ok(request), Some(router)) = (request, &mut self.replay) else { continue };
            let Some(request) = Request::of(&request.into_vec()) else { continue };
            if sent.has_dropped(request.first) {
                again.store(true, Ordering::Relaxed);
            }
            if let Err(error) = replay(router, &request, &topic, &sent).await {
                tracing::warn!(%error, "a replay of KV events was given up");
            }
        }
    }
}

async fn bind<S: Socket>(endpoint: &str) -> Result<(S, String), PublishError> {
    let mut socket = S::new();
    // The library of the sockets looks `*` up as the name of a host.
    let address = match endpoint.strip_prefix("tcp://*:") {
        Some(port) => format!("tcp://0.0.0.0:{port}"),
        None => endpoint.to_owned(),
    };
    match socket.bind(&address).await {
        Ok(bound) => Ok((socket, bound.to_string())),
        Err(error) => Err(PublishError::Bind { endpoint: endpoint.to_owned(), error }),
    }
}

/// A request for a replay.
struct Request {
    /// Who asks.
    identity: Bytes,
    /// The first sequence number that is wanted.
    first: u64,
}

impl Request {
    /// The frames of a request: the identity, which the socket adds, an empty frame, and the sequence number.
    fn of(frames: &[Bytes]) -> Option<Self> {
        let [identity, _, first] = frames else { return None };
        Some(Self { identity: identity.clone(), first: u64::from_be_bytes(first[..].try_into().ok()?) })
    }
}

async fn replay(router: &mut RouterSocket, request: &Request, topic: &Bytes, sent: &Sent) -> Result<(), ZmqError> {
    let answer = |topic: &Bytes, sequence: [u8; 8], batch: &Bytes| {
        vec![request.identity.clone(), Bytes::new(), topic.clone(), Bytes::copy_from_slice(&sequence), batch.clone()]
    };
    for (sequence, batch) in sent.from(request.first) {
        send(router, answer(topic, sequence.to_be_bytes(), batch)).await?;
    }
    send(router, answer(&Bytes::new(), END, &Bytes::new())).await
}

/// Sends a message, if there is room for it at once. A peer that does not read must not hold up the others; each has
/// room for 100,000 messages.
async fn send(socket: &mut impl SocketSend, frames: Vec<Bytes>) -> Result<(), ZmqError> {
    // Only a message without frames is refused.
    let Ok(message) = ZmqMessage::try_from(frames) else { return Ok(()) };
    let sent = tokio::time::timeout(Duration::ZERO, socket.send(message)).await;
    sent.unwrap_or(Err(ZmqError::Other("the peer does not read")))
}
