//! `POST /v1/completions`: a text is continued.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use inference::engine::Logprobs;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::collect::{Choice, collect};
use super::error::ApiError;
use super::stream::{Part, stream};
use super::{Server, fields, json, now};

/// The most alternatives to a token; OpenAI's limit.
const MOST_LOGPROBS: usize = 5;

/// The length of an answer if the request does not say; OpenAI's.
const MAX_TOKENS: usize = 16;

#[derive(Debug, Deserialize)]
struct Completion {
    prompt: Prompt,
    logprobs: Option<usize>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    SeveralTokens(Vec<Vec<u32>>),
}

pub(super) async fn answer(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, ApiError> {
    let (common, completion) = fields::read::<Completion>(&body, &["prompt", "logprobs"])?;
    server.check_model(&common)?;
    let streams = common.streams()?;
    let max_tokens = common.max_tokens.unwrap_or(MAX_TOKENS);
    if let Some(most) = completion.logprobs.filter(|&most| most > MOST_LOGPROBS) {
        return Err(ApiError::field("logprobs", format!("`logprobs` is {most}, the most is {MOST_LOGPROBS}")));
    }
    let options = server.options(&common, &headers, completion.logprobs)?;
    let prompts = completion.prompts(&server).await?;
    let submitted = server.submit(prompts, Some(max_tokens), &options, &common.stops()?)?;
    let id = format!("cmpl-{:032x}", rand::random::<u128>());
    let head = move |model: &str| {
        json!({
            "id": id, "object": "text_completion", "created": now(), "model": model, "system_fingerprint": null
        })
    };
    if let Some(include_usage) = streams {
        let server = server.clone();
        return Ok(stream(submitted, include_usage, move |part| {
            let mut chunk = head(&server.model);
            let choice = |index: usize, text: String, logprobs: Value, reason: Value| {
                json!([{
                    "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason
                }])
            };
            if include_usage {
                chunk["usage"] = Value::Null;
            }
            chunk["choices"] = match part {
                Part::Begin(i) => choice(i, String::new(), Value::Null, Value::Null),
                Part::Text(i, text, logprobs) => {
                    let logprobs = server.text_logprobs(&logprobs);
                    choice(i, text, logprobs, Value::Null)
                }
                Part::End(i, reason) => choice(i, String::new(), Value::Null, reason.into()),
                Part::Usage(usage) => {
                    chunk["usage"] = usage.json();
                    json!([])
                }
            };
            chunk
        }));
    }
    let (choices, usage) = collect(submitted).await?;
    let mut whole = head(&server.model);
    whole["usage"] = usage.json();
    let choice = |(index, choice): (usize, Choice)| {
        let logprobs = server.text_logprobs(&choice.logprobs);
        json!({ "index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.reason })
    };
    whole["choices"] = choices.into_iter().enumerate().map(choice).collect();
    Ok(json(whole))
}

impl Completion {
    /// The tokens of each prompt.
    async fn prompts(self, server: &Arc<Server>) -> Result<Vec<Vec<u32>>, ApiError> {
        let prompts = match self.prompt {
            Prompt::Text(text) => return Ok(vec![server.tokens(move |server| server.tokenizer.encode(&text)).await?]),
            Prompt::Texts(texts) => {
                let mut prompts = Vec::new();
                for text in texts {
                    prompts.push(server.tokens(move |server| server.tokenizer.encode(&text)).await?);
                }
                prompts
            }
            Prompt::Tokens(tokens) => vec![tokens],
            Prompt::SeveralTokens(prompts) => prompts,
        };
        if prompts.is_empty() {
            return Err(ApiError::field("prompt", "`prompt` is empty"));
        }
        let size = server.tokenizer.vocab_size();
        if let Some(token) = prompts.iter().flatten().find(|&&token| token as usize >= size) {
            return Err(ApiError::field("prompt", format!("there is no token {token}, the vocabulary has {size}")));
        }
        Ok(prompts)
    }
}

impl Server {
    fn text_logprobs(&self, logprobs: &[(u32, Logprobs)]) -> Value {
        if logprobs.is_empty() {
            return Value::Null;
        }
        let text = |token: u32| self.tokenizer.decode(&[token]).unwrap_or_default();
        let top = |(_, logprobs): &(u32, Logprobs)| -> Value {
            let entries = logprobs.top.iter().map(|top| (text(top.token), top.logprob.into()));
            Value::Object(entries.collect::<Map<_, _>>())
        };
        json!({
            "tokens": logprobs.iter().map(|(token, _)| text(*token)).collect::<Vec<_>>(),
            "token_logprobs": logprobs.iter().map(|(_, logprobs)| logprobs.drawn).collect::<Vec<_>>(),
            "top_logprobs": logprobs.iter().map(top).collect::<Vec<_>>(),
        })
    }
}
