//! The fields that chats and completions have in common, and those that are refused by name.

use axum::body::Bytes;
use inference::engine::RequestOptions;
use inference::sampling::Sampling;
use paged_attention::Salt;
use rand::Rng;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::error::ApiError;

/// The most answers to a prompt.
const MOST_CHOICES: usize = 128;

/// The most texts at which an answer stops; OpenAI's limit.
const MOST_STOPS: usize = 4;

/// Fields of OpenAI's API that only matter to its own service.
const IGNORED: [&str; 8] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
];

/// What a chat and a completion have in common.
#[derive(Debug, Deserialize)]
pub(super) struct Common {
    pub(super) model: Option<String>,
    pub(super) n: Option<usize>,
    pub(super) max_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    seed: Option<i64>,
    #[serde(default)]
    stop: Stop,
    pub(super) stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// Only requests with the same share what they have in common; vLLM's name.
    cache_salt: Option<String>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(untagged)]
enum Stop {
    #[default]
    None,
    One(String),
    Several(Vec<String>),
    Null(()),
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// Reads a body. Fields that are not of `T` are refused by name, unless they are null or do not matter.
pub(super) fn read<T: DeserializeOwned>(body: &Bytes, known: &[&str]) -> Result<(Common, T), ApiError> {
    const COMMON: [&str; 13] = [
        "model",
        "n",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "cache_salt",
        "presence_penalty",
        "frequency_penalty",
        "response_format",
    ];
    let wrong = |error: serde_json::Error| ApiError::invalid(format!("the body is not a valid request: {error}"));
    let fields: Map<String, Value> = serde_json::from_slice(body).map_err(wrong)?;
    for (name, value) in &fields {
        let is = |names: &[&str]| names.contains(&name.as_str());
        if value.is_null() || is(&COMMON) || is(&IGNORED) || is(known) {
            continue;
        }
        return Err(ApiError::unsupported(name, format!("`{name}` is not supported here")));
    }
    if let Some(format) = fields.get("response_format").filter(|format| !format.is_null()) {
        let kind = format.get("type").and_then(Value::as_str);
        if kind != Some("text") {
            let kind = kind.unwrap_or("?");
            let message = format!("`response_format` of the type `{kind}` is not supported here, only `text` is");
            return Err(ApiError::unsupported("response_format", message));
        }
    }
    let value = Value::Object(fields);
    let common = Common::deserialize(&value).map_err(wrong)?;
    Ok((common, serde_json::from_value(value).map_err(wrong)?))
}

impl Common {
    /// Whether the answer is streamed, and whether the stream ends with the usage.
    pub(super) fn streams(&self) -> Result<Option<bool>, ApiError> {
        match (self.stream.unwrap_or(false), &self.stream_options) {
            (true, options) => Ok(Some(options.as_ref().and_then(|options| options.include_usage).unwrap_or(false))),
            (false, None) => Ok(None),
            (false, Some(_)) => Err(ApiError::field("stream_options", "`stream_options` needs `stream`")),
        }
    }

    /// How the request is answered. `key` is the client's.
    pub(super) fn options(
        &self,
        max_num_seqs: usize,
        key: Option<[u8; 32]>,
        logprobs: Option<usize>,
    ) -> Result<RequestOptions, ApiError> {
        for (name, penalty) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            if penalty.is_some_and(|penalty| penalty != 0.0) {
                return Err(ApiError::unsupported(name, format!("`{name}` is not supported here, only 0 is")));
            }
        }
        let samples = self.n.unwrap_or(1);
        let most = max_num_seqs.min(MOST_CHOICES);
        if !(1..=most).contains(&samples) {
            return Err(ApiError::field("n", format!("`n` is {samples}, it must be from 1 to {most}")));
        }
        let temperature = self.temperature.unwrap_or(1.0);
        if !(0.0..=2.0).contains(&temperature) {
            let message = format!("`temperature` is {temperature}, it must be from 0 to 2");
            return Err(ApiError::field("temperature", message));
        }
        let sampling = Sampling::new(temperature, self.top_p.unwrap_or(1.0));
        let sampling = sampling.map_err(|error| ApiError::field("top_p", error.to_string()))?;
        let seed = self.seed.map_or_else(|| rand::rng().random(), |seed| seed as u64);
        Ok(RequestOptions { samples, seed, sampling, salt: self.salt(key), logprobs })
    }

    /// Clients with different keys share nothing, and requests with different salts.
    fn salt(&self, key: Option<[u8; 32]>) -> Salt {
        if key.is_none() && self.cache_salt.is_none() {
            return Salt::none();
        }
        let mut hash = Sha256::new();
        hash.update(key.unwrap_or_default());
        hash.update(self.cache_salt.as_deref().unwrap_or_default());
        Salt::new(&hash.finalize())
    }

    /// The texts at which an answer stops.
    pub(super) fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = match &self.stop {
            Stop::None | Stop::Null(()) => Vec::new(),
            Stop::One(stop) => vec![stop.clone()],
            Stop::Several(stops) => stops.clone(),
        };
        match stops.len() <= MOST_STOPS && stops.iter().all(|stop| !stop.is_empty()) {
            true => Ok(stops),
            false => {
                Err(ApiError::field("stop", format!("`stop` must be at most {MOST_STOPS} texts, none of them empty")))
            }
        }
    }
}
