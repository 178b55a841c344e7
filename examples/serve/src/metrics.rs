//! Metrics for Prometheus, under the names that vLLM has made common, so that dashboards and routers find them.

use std::time::Duration;

use anyhow::{Result, anyhow};
use inference::engine::Engine;
use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use paged_attention::BlockPool;

/// Seconds.
const BUCKETS: [f64; 16] =
    [0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 300.0];

/// Begins to count, for the whole process.
///
/// # Errors
///
/// If the process counts already.
pub fn install() -> Result<PrometheusHandle> {
    let builder = PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &BUCKETS);
    let builder = builder.map_err(|error| anyhow!("cannot count: {error}"))?;
    builder.install_recorder().map_err(|error| anyhow!("cannot count: {error}"))
}

/// Takes note of what runs and waits, and of the pool.
pub fn state(engine: &Engine<'_>, pool: &BlockPool) {
    gauge!("vllm:num_requests_running").set(engine.running() as f64);
    gauge!("vllm:num_requests_waiting").set(engine.waiting() as f64);
    gauge!("vllm:kv_cache_usage_perc").set(pool.in_use() as f64 / pool.units().max(1) as f64);
    let stats = pool.stats();
    counter!("vllm:prefix_cache_queries_total").absolute(stats.queried_tokens);
    counter!("vllm:prefix_cache_hits_total").absolute(stats.hit_tokens);
    counter!("serve_cache_evictions_total").absolute(stats.evictions);
}

/// Takes note of a step.
pub fn step(time: Duration) {
    histogram!("serve_step_seconds").record(time);
}

/// Takes note of an answer that is complete.
pub fn finished(reason: &'static str, prompt_tokens: usize, tokens: usize, since: Duration) {
    counter!("vllm:request_success_total", "finished_reason" => reason).increment(1);
    counter!("vllm:prompt_tokens_total").increment(prompt_tokens as u64);
    counter!("vllm:generation_tokens_total").increment(tokens as u64);
    histogram!("vllm:e2e_request_latency_seconds").record(since);
}

/// Takes note of a token that came so long after the one before it, or, if it is the first, after its request.
pub fn token(first: bool, since: Duration) {
    if first {
        histogram!("vllm:time_to_first_token_seconds").record(since);
    } else {
        histogram!("vllm:inter_token_latency_seconds").record(since);
    }
}

/// Takes note of a request that was refused, or given up, with this status.
pub fn refused(status: u16) {
    counter!("serve_requests_refused_total", "status" => status.to_string()).increment(1);
}
