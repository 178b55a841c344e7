//! Answers as they come, by server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use inference::engine::Logprobs;
use serde_json::Value;

use super::collect::Usage;
use super::error::ApiError;
use super::submit::Submitted;
use crate::worker::Reply;

/// What an event of a stream is about.
pub(super) enum Part {
    /// The answer with this number has begun.
    Begin(usize),
    /// It has grown.
    Text(usize, String, Vec<(u32, Logprobs)>),
    /// It is complete.
    End(usize, &'static str),
    /// All are.
    Usage(Usage),
}

/// What is sent to one client.
struct Events<F> {
    submitted: Submitted,
    usage: Usage,
    include_usage: bool,
    json: F,
    /// Events that are known, and not sent yet.
    ready: VecDeque<Event>,
    /// Whether there will be no more.
    ended: bool,
}

/// The stream. `json` gives the JSON of each event.
pub(super) fn stream(
    submitted: Submitted,
    include_usage: bool,
    json: impl Fn(Part) -> Value + Send + 'static,
) -> Response {
    let ready = (0..submitted.choices).map(|choice| event(&json(Part::Begin(choice)))).collect();
    let usage = Usage::of(&submitted);
    let events = Events { submitted, usage, include_usage, json, ready, ended: false };
    let events = unfold(events, |mut events| async {
        let next = events.next().await?;
        Some((Ok::<_, Infallible>(next), events))
    });
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

fn event(json: &Value) -> Event {
    Event::default().data(json.to_string())
}

impl<F: Fn(Part) -> Value> Events<F> {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match self.submitted.replies.recv().await {
                Some(Reply::Piece { choice, text, logprobs }) => self.push(Part::Text(choice, text, logprobs)),
                Some(Reply::Finished { choice, reason, tokens, cached_tokens }) => {
                    self.usage.add(choice, tokens, cached_tokens);
                    self.push(Part::End(choice, reason));
                    if self.usage.complete == self.submitted.choices {
                        if self.include_usage {
                            self.push(Part::Usage(self.usage));
                        }
                        self.end();
                    }
                }
                Some(Reply::Failed(failure)) => self.fail(&ApiError::failed(failure)),
                None => self.fail(&ApiError::stopping()),
            }
        }
    }

    fn push(&mut self, part: Part) {
        self.ready.push_back(event(&(self.json)(part)));
    }

    /// The status was sent long ago, so the error is an event.
    fn fail(&mut self, error: &ApiError) {
        self.ready.push_back(event(&error.body()));
        self.end();
    }

    fn end(&mut self) {
        self.ready.push_back(Event::default().data("[DONE]"));
        self.ended = true;
    }
}
