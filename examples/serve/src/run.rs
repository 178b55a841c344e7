//! From the arguments to a server that listens, and to its end.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use inference::chat::ChatTemplate;
use inference::engine::{Limits, STEP_TOKENS};
use inference::model::Gguf;
use inference::model_file;
use inference::setup::{cache, load, prefix_cache, weights};
use inference::shown::say;
use inference::tokenizer::Tokenizer;
use kv_events::Publisher;
use paged_attention::{OffloadOptions, Tier};
use tokio::net::TcpListener;
use tokio::runtime::Builder;
use tokio::sync::Semaphore;

use crate::api::{Server, hash, now, router};
use crate::args::Args;
use crate::metrics;
use crate::worker::{Machine, Worker};

/// Serves until the process is asked to stop.
///
/// # Errors
///
/// If an argument or a file is wrong, the machine has too little memory, or the address is taken.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.max_num_seqs > 0, "a batch of 0 sequences computes nothing");
    ensure!(args.max_waiting > 0, "a queue without places takes no request");
    ensure!(args.step_time > 0, "steps of 0 ms compute nothing");
    args.cache.check()?;

    let file = model_file::obtain(args.model.model.as_deref(), &say)?;
    say(&format!("model: {} ({})", file.path.display(), file.origin));
    let mut gguf = Gguf::open(&file.path)?;
    let tokenizer = Arc::new(Tokenizer::from_gguf(&gguf.content)?);
    let template = ChatTemplate::from_gguf(&gguf.content)?;
    let context = args.max_model_len.unwrap_or(usize::MAX).min(gguf.config().context());
    let cache = cache(&args.cache, gguf.config().groups())?;
    // Before the weights are loaded, which takes longer: the address may be taken.
    let runtime = Builder::new_multi_thread().worker_threads(2).thread_name("http").enable_all().build()?;
    let address = SocketAddr::new(args.host, args.port);
    let listener =
        runtime.block_on(TcpListener::bind(address)).with_context(|| format!("cannot listen on {address}"))?;
    let weights = weights(args.model.weights.fixed(), &mut gguf, context)?;
    let model = load(&mut gguf, weights, context)?;
    let tier = prefix_cache(&args.cache, &file.path, &gguf, weights, context, &cache)?.map(Arc::new);
    // Written through, because what is cached when the program ends is not evicted.
    let options = OffloadOptions::default().write_through(true);
    let offload = tier.clone().map(|tier| cache.pool().offload_to(tier, &options)).transpose()?;
    let publisher = args.kv_events.as_deref().map(|endpoint| Publisher::builder(endpoint).start(cache.pool()));
    let publisher = publisher.transpose().context("cannot publish the cache's events")?;
    if let Some(publisher) = &publisher {
        say(&format!("events of the cache: {}", publisher.endpoint()));
    }

    let step_time = Some(Duration::from_millis(args.step_time));
    let limits = Limits { max_batch: args.max_num_seqs, step_tokens: STEP_TOKENS, step_time };
    let tier = tier.map(|tier| tier as Arc<dyn Tier>);
    let machine = Machine { model, cache: cache.clone(), tokenizer: tokenizer.clone(), tier, limits };
    let metrics = metrics::install()?;
    let (worker, thread) = Worker::start(machine)?;
    let name = file.path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let server = Arc::new(Server {
        model: args.served_model_name.clone().or(name).unwrap_or_default(),
        created: now(),
        context,
        max_num_seqs: args.max_num_seqs,
        step_tokens: STEP_TOKENS,
        tokenizer,
        template,
        cache,
        worker: worker.clone(),
        places: Arc::new(Semaphore::new(args.max_waiting)),
        max_waiting: args.max_waiting,
        keys: args.api_key.iter().map(|key| hash(key)).collect(),
        timeout: Duration::from_secs(args.request_timeout),
        stopping: AtomicBool::new(false),
        metrics,
    });
    say(&greeting(listener.local_addr()?, &server));
    let patience = Duration::from_secs(args.shutdown_timeout);
    let served = runtime.block_on(serve(listener, server, patience));
    // Clients that do not read their answers are not waited for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    // The engine ends with the last handle.
    worker.stop_by(Instant::now());
    drop(worker);
    if thread.join().is_err() {
        say("error: the engine has panicked");
    }
    if let Some(offload) = offload {
        offload.flush();
        say(&format!("prefix cache: {} blocks stored", offload.stats().stored));
    }
    served
}

/// What is printed as soon as the server listens: it works as it stands.
fn greeting(address: SocketAddr, server: &Server) -> String {
    let key = if server.keys.is_empty() { "" } else { " -H 'Authorization: Bearer KEY'" };
    let body = r#"{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}"#;
    format!(
        "{} listens on http://{address}\n\ncurl http://{address}/v1/chat/completions{key} -d '{body}'\n",
        server.model
    )
}

async fn serve(listener: TcpListener, server: Arc<Server>, patience: Duration) -> Result<()> {
    let stop = {
        let server = server.clone();
        async move {
            asked_to_stop().await;
            say("stopping: no new requests, those that run may end");
            server.stopping.store(true, Ordering::Relaxed);
            server.worker.stop_by(Instant::now() + patience);
        }
    };
    within(patience, stop, |stop| async move {
        axum::serve(listener, router(server)).with_graceful_shutdown(stop).await.context("the server failed")
    })
    .await
}

/// Runs what ends some time after `stop` does, but not longer than `patience` after it, and a second for what is sent.
async fn within<S, F>(
    patience: Duration,
    stop: S,
    run: impl FnOnce(std::pin::Pin<Box<dyn Future<Output = ()> + Send>>) -> F,
) -> Result<()>
where
    S: Future<Output = ()> + Send + 'static,
    F: Future<Output = Result<()>>,
{
    let (sender, stopped) = tokio::sync::oneshot::channel();
    let stop = Box::pin(async move {
        stop.await;
        let _ = sender.send(());
    });
    let late = async {
        let _ = stopped.await;
        tokio::time::sleep(patience + Duration::from_secs(1)).await;
    };
    tokio::select! {
        ended = run(stop) => ended,
        () = late => Ok(()),
    }
}

/// Ends when the process gets an interrupt, or is asked to terminate.
async fn asked_to_stop() {
    let interrupt = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    #[cfg(unix)]
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending::<()>();
    tokio::select! {
        () = interrupt => {}
        () = terminate => {}
    }
}
