//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use inference::chat::Message;
use inference::engine::Logprobs;
use serde::Deserialize;
use serde_json::{Value, json};

use super::collect::{Choice, collect};
use super::error::ApiError;
use super::stream::{Part, stream};
use super::{Server, fields, json, now};

/// The most alternatives to a token; OpenAI's limit.
const MOST_LOGPROBS: usize = 20;

#[derive(Debug, Deserialize)]
struct Chat {
    messages: Vec<Given>,
    max_completion_tokens: Option<usize>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
}

/// A message as a client gives it.
#[derive(Debug, Deserialize)]
struct Given {
    role: String,
    content: Option<Content>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

#[derive(Debug, Deserialize)]
struct ContentPart {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

pub(super) async fn answer(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, ApiError> {
    let known = ["messages", "max_completion_tokens", "logprobs", "top_logprobs"];
    let (common, chat) = fields::read::<Chat>(&body, &known)?;
    server.check_model(&common)?;
    let streams = common.streams()?;
    let max_tokens = chat.max_completion_tokens.or(common.max_tokens);
    let options = server.options(&common, &headers, chat.logprobs()?)?;
    let messages = chat.messages()?;
    let prompt = server.tokens(move |server| server.tokenizer.encode_chat(&server.template, &messages)).await?;
    let submitted = server.submit(vec![prompt], max_tokens, &options, &common.stops()?)?;
    let id = format!("chatcmpl-{:032x}", rand::random::<u128>());
    let head = move |object: &str, model: &str| {
        json!({
            "id": id, "object": object, "created": now(), "model": model, "system_fingerprint": null
        })
    };
    if let Some(include_usage) = streams {
        let server = server.clone();
        return Ok(stream(submitted, include_usage, move |part| {
            let mut chunk = head("chat.completion.chunk", &server.model);
            let delta = |index: usize, delta: Value, logprobs: Value, reason: Value| {
                json!([{
                    "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason
                }])
            };
            if include_usage {
                chunk["usage"] = Value::Null;
            }
            chunk["choices"] = match part {
                Part::Begin(i) => delta(i, json!({ "role": "assistant", "content": "" }), Value::Null, Value::Null),
                Part::Text(i, text, logprobs) => {
                    delta(i, json!({ "content": text }), server.chat_logprobs(&logprobs), Value::Null)
                }
                Part::End(i, reason) => delta(i, json!({}), Value::Null, reason.into()),
                Part::Usage(usage) => {
                    chunk["usage"] = usage.json();
                    json!([])
                }
            };
            chunk
        }));
    }
    let (choices, usage) = collect(submitted).await?;
    let mut whole = head("chat.completion", &server.model);
    whole["usage"] = usage.json();
    let choice = |(index, choice): (usize, Choice)| {
        json!({
            "index": index,
            "message": { "role": "assistant", "content": choice.text, "refusal": null },
            "logprobs": server.chat_logprobs(&choice.logprobs),
            "finish_reason": choice.reason,
        })
    };
    whole["choices"] = choices.into_iter().enumerate().map(choice).collect();
    Ok(json(whole))
}

impl Chat {
    /// Of how many alternatives the log probabilities are wanted.
    fn logprobs(&self) -> Result<Option<usize>, ApiError> {
        match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (false, Some(most)) if most > 0 => Err(ApiError::field("top_logprobs", "`top_logprobs` needs `logprobs`")),
            (_, Some(most)) if most > MOST_LOGPROBS => {
                Err(ApiError::field("top_logprobs", format!("`top_logprobs` is {most}, the most is {MOST_LOGPROBS}")))
            }
            (wanted, most) => Ok(wanted.then_some(most.unwrap_or(0))),
        }
    }

    fn messages(&self) -> Result<Vec<Message>, ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::field("messages", "`messages` is empty"));
        }
        self.messages.iter().enumerate().map(|(i, given)| given.message(i)).collect()
    }
}

impl Given {
    fn message(&self, number: usize) -> Result<Message, ApiError> {
        let role = match self.role.as_str() {
            // What OpenAI's newer models call it.
            "developer" => "system",
            role @ ("system" | "user" | "assistant") => role,
            other => {
                let message = format!("messages[{number}] has the role `{other}`, which is not supported here");
                return Err(ApiError::unsupported("messages", message));
            }
        };
        let text = match &self.content {
            None => return Err(ApiError::field("messages", format!("messages[{number}] has no content"))),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => {
                if let Some(part) = parts.iter().find(|part| part.kind != "text") {
                    let kind = &part.kind;
                    let message =
                        format!("messages[{number}] has a part of the type `{kind}`, only `text` is supported here");
                    return Err(ApiError::unsupported("messages", message));
                }
                parts.iter().filter_map(|part| part.text.as_deref()).collect()
            }
        };
        Ok(Message::new(role, &text))
    }
}

impl Server {
    fn chat_logprobs(&self, logprobs: &[(u32, Logprobs)]) -> Value {
        if logprobs.is_empty() {
            return Value::Null;
        }
        let of = |token: u32, logprob: f32| {
            let text = self.tokenizer.decode(&[token]).unwrap_or_default();
            json!({ "token": text, "logprob": logprob, "bytes": text.as_bytes() })
        };
        let content = logprobs.iter().map(|(token, Logprobs { drawn, top })| {
            let mut entry = of(*token, *drawn);
            entry["top_logprobs"] = top.iter().map(|top| of(top.token, top.logprob)).collect();
            entry
        });
        json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
    }
}
