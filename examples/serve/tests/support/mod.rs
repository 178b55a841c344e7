//! A server in this process, over a small model that the tests write themselves.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test binary uses a different part

#[path = "../../../inference/tests/common/mod.rs"]
pub mod common;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use inference::chat::ChatTemplate;
use inference::engine::{LanguageModel, Limits};
use inference::model::{Gguf, Model};
use inference::tokenizer::Tokenizer;
use metrics_exporter_prometheus::PrometheusBuilder;
use paged_attention::{Attention, KvCache, Step};
use serde_json::Value;
use serve::api::{Server, hash, router};
use serve::worker::{Machine, Worker};
use tokio::sync::Semaphore;
use tower::ServiceExt;

/// What differs between tests.
#[derive(Clone)]
pub struct Setup {
    pub blocks: usize,
    pub max_waiting: usize,
    pub max_num_seqs: usize,
    pub timeout: Duration,
    pub keys: Vec<&'static str>,
    /// Each step takes at least so long.
    pub slow: Duration,
    /// The number of the step that fails.
    pub fails_at: usize,
}

impl Default for Setup {
    fn default() -> Self {
        let timeout = Duration::from_secs(60);
        let (keys, slow) = (Vec::new(), Duration::ZERO);
        Self { blocks: 256, max_waiting: 64, max_num_seqs: 8, timeout, keys, slow, fails_at: usize::MAX }
    }
}

/// A model that takes its time, and fails once.
struct Slow {
    model: Model,
    slow: Duration,
    steps: std::sync::atomic::AtomicUsize,
    fails_at: usize,
}

impl LanguageModel for Slow {
    fn context(&self) -> usize {
        self.model.context()
    }

    fn attention(&self) -> Attention {
        self.model.attention()
    }

    fn forward(&self, step: &Step<'_>) -> candle_core::Result<candle_core::Tensor> {
        std::thread::sleep(self.slow);
        if self.steps.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == self.fails_at {
            candle_core::bail!("a matrix is on fire");
        }
        self.model.forward(step)
    }
}

/// The server of a test.
pub struct Served {
    pub server: Arc<Server>,
    pub cache: KvCache,
    pub tokenizer: Arc<Tokenizer>,
    router: Router,
    folder: tempfile::TempDir,
}

impl Served {
    pub fn new(setup: Setup) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        common::write_changed(&path, |metadata, _| {
            let template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}a:";
            metadata.insert(
                "tokenizer.chat_template".into(),
                candle_core::quantized::gguf_file::Value::String(template.into()),
            );
        });
        let gguf = Gguf::open(&path).unwrap();
        let tokenizer = Arc::new(Tokenizer::from_gguf(&gguf.content).unwrap());
        let template = ChatTemplate::from_gguf(&gguf.content).unwrap();
        let model = common::load(&path);
        let cache = KvCache::builder_of(model.groups()).blocks(setup.blocks).block_size(4).build().unwrap();
        let limits = Limits { max_batch: setup.max_num_seqs, step_tokens: 64, step_time: None };
        let Setup { slow, fails_at, .. } = setup;
        let context = model.context();
        let model = Slow { model, slow, steps: 0.into(), fails_at };
        let machine = Machine { model, cache: cache.clone(), tokenizer: tokenizer.clone(), tier: None, limits };
        let (worker, _) = Worker::start(machine).unwrap();
        let server = Arc::new(Server {
            model: "tiny".into(),
            created: 0,
            context,
            max_num_seqs: setup.max_num_seqs,
            step_tokens: 64,
            tokenizer: tokenizer.clone(),
            template,
            cache: cache.clone(),
            worker,
            places: Arc::new(Semaphore::new(setup.max_waiting)),
            max_waiting: setup.max_waiting,
            keys: setup.keys.iter().map(|key| hash(key)).collect(),
            timeout: setup.timeout,
            stopping: AtomicBool::new(false),
            metrics: PrometheusBuilder::new().build_recorder().handle(),
        });
        Self { router: router(server.clone()), server, cache, tokenizer, folder }
    }

    /// Sends a request, and returns the answer as soon as its head is there.
    pub async fn send(&self, method: Method, path: &str, key: Option<&str>, body: Body) -> Response<Body> {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        self.router.clone().oneshot(request.body(body).unwrap()).await.unwrap()
    }

    /// Posts JSON, and waits for the whole answer.
    pub async fn post(&self, path: &str, json: &Value) -> (StatusCode, Value) {
        let response = self.send(Method::POST, path, None, json.to_string().into()).await;
        whole(response).await
    }

    /// The events of a stream; the last must be `[DONE]`.
    pub async fn stream(&self, path: &str, json: &Value) -> Vec<Value> {
        let response = self.send(Method::POST, path, None, json.to_string().into()).await;
        assert_eq!(response.status(), StatusCode::OK);
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let mut events: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// Waits until no block is in use.
    pub async fn idle(&self) {
        for _ in 0..500 {
            if self.cache.pool().in_use() == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} blocks are in use after five seconds", self.cache.pool().in_use());
    }
}

/// The status and the JSON of an answer.
pub async fn whole(response: Response<Body>) -> (StatusCode, Value) {
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}
