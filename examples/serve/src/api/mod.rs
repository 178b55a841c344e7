//! OpenAI's API, as far as a language model without tools can answer it.
//!
//! - `error` has the form of errors.
//! - `fields` has what chats and completions have in common, and names what is not offered.
//! - `chat` and `completions` read a request and say how its answers look; `models` lists the model.
//! - `submit` passes a request to the engine; `collect` and `stream` answer, at once or as it comes.

mod chat;
mod collect;
mod completions;
mod error;
mod fields;
mod models;
mod stream;
mod submit;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use inference::chat::ChatTemplate;
use inference::tokenizer::Tokenizer;
use metrics_exporter_prometheus::PrometheusHandle;
use paged_attention::KvCache;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

pub use error::ApiError;

use crate::worker::Worker;

/// The longest body of a request: some twenty times the text of the longest context here.
const BODY: usize = 16 << 20;

/// What the handlers need.
pub struct Server {
    /// The model's name.
    pub model: String,
    /// When the server started, in seconds since 1970.
    pub created: u64,
    /// The most tokens in a sequence.
    pub context: usize,
    /// The most sequences that run together.
    pub max_num_seqs: usize,
    /// The most tokens in a step.
    pub step_tokens: usize,
    /// Turns text into tokens.
    pub tokenizer: Arc<Tokenizer>,
    /// Formats chats.
    pub template: ChatTemplate,
    /// The cache, for what can never fit into it.
    pub cache: KvCache,
    /// The engine.
    pub worker: Worker,
    /// Free places in the queue.
    pub places: Arc<Semaphore>,
    /// How many places it has.
    pub max_waiting: usize,
    /// The keys of clients, as hashes; anybody is a client if there are none.
    pub keys: Vec<[u8; 32]>,
    /// After how long a request is given up.
    pub timeout: Duration,
    /// Whether the server is about to stop.
    pub stopping: AtomicBool,
    /// The metrics.
    pub metrics: PrometheusHandle,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("model", &self.model).finish_non_exhaustive()
    }
}

/// The routes.
pub fn router(server: Arc<Server>) -> Router {
    let api = Router::new()
        .route("/v1/chat/completions", post(chat::answer))
        .route("/v1/completions", post(completions::answer))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{model}", get(models::one))
        .layer(from_fn_with_state(server.clone(), authorised));
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .merge(api)
        .method_not_allowed_fallback(|| async { ApiError::not_allowed() })
        .fallback(|| async { ApiError::no_route() })
        .layer(DefaultBodyLimit::max(BODY))
        .with_state(server)
}

/// The hash by which a key is known. Keys are compared as hashes, so that the time says nothing about them.
pub fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// The hash of the key that a request has.
fn key_of(headers: &HeaderMap) -> Option<[u8; 32]> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| hash(key.trim()))
}

async fn authorised(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let known = key_of(request.headers()).is_some_and(|key| server.keys.contains(&key));
    match server.keys.is_empty() || known {
        true => next.run(request).await,
        false => ApiError::no_key().into_response(),
    }
}

async fn health(State(server): State<Arc<Server>>) -> StatusCode {
    let stopping = server.stopping.load(std::sync::atomic::Ordering::Relaxed);
    if stopping { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}

async fn metrics(State(server): State<Arc<Server>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], server.metrics.render())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Server {
    /// Turns text into tokens in another thread: a long text takes long.
    async fn tokens(
        self: &Arc<Self>,
        encode: impl FnOnce(&Self) -> anyhow::Result<Vec<u32>> + Send + 'static,
    ) -> Result<Vec<u32>, ApiError> {
        let server = self.clone();
        let tokens = spawn_blocking(move || encode(&server)).await;
        let tokens = tokens.map_err(|error| ApiError::invalid(format!("the prompt cannot be read: {error}")))?;
        tokens.map_err(|error| ApiError::invalid(format!("{error:#}")))
    }
}

/// An answer of JSON.
fn json(value: impl serde::Serialize) -> Response {
    Json(value).into_response()
}
