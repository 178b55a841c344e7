//! Passes a request to the engine.

use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::http::HeaderMap;
use inference::engine::{Request, RequestOptions, why_never};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::error::ApiError;
use super::fields::Common;
use super::{Server, key_of};
use crate::worker::{Job, Reply};

/// A request that the engine has.
pub(super) struct Submitted {
    pub(super) replies: UnboundedReceiver<Reply>,
    /// How many answers there will be.
    pub(super) choices: usize,
    /// How many of them answer each prompt.
    pub(super) samples: usize,
    /// Tokens of all prompts.
    pub(super) prompt_tokens: usize,
}

impl Server {
    /// Refuses a request that is not for the served model.
    pub(super) fn check_model(&self, common: &Common) -> Result<(), ApiError> {
        match &common.model {
            Some(model) if *model != self.model => Err(ApiError::no_model(model, &self.model)),
            _ => Ok(()),
        }
    }

    /// How requests with these headers are answered.
    pub(super) fn options(
        &self,
        common: &Common,
        headers: &HeaderMap,
        logprobs: Option<usize>,
    ) -> Result<RequestOptions, ApiError> {
        let key = key_of(headers).filter(|_| !self.keys.is_empty());
        common.options(self.max_num_seqs, key, logprobs)
    }

    /// Puts prompts into the queue, all or none. `max_tokens` is as many as fit if it is `None`.
    pub(super) fn submit(
        &self,
        prompts: Vec<Vec<u32>>,
        max_tokens: Option<usize>,
        options: &RequestOptions,
        stop: &[String],
    ) -> Result<Submitted, ApiError> {
        let since = Instant::now();
        let mut requests = Vec::new();
        for prompt in prompts {
            let left = self.context.saturating_sub(prompt.len()).max(1);
            let request = Request { max_tokens: max_tokens.unwrap_or(left), prompt };
            requests.push(self.checked(request, max_tokens.is_none())?);
        }
        if self.stopping.load(Ordering::Relaxed) {
            return Err(ApiError::stopping());
        }
        let places =
            u32::try_from(requests.len()).ok().and_then(|n| self.places.clone().try_acquire_many_owned(n).ok());
        let mut places = places.ok_or_else(|| ApiError::full(self.waiting()))?;
        let (sender, replies) = unbounded_channel();
        let prompt_tokens = requests.iter().map(|request| request.prompt.len()).sum();
        let choices = requests.len() * options.samples;
        for (request, number) in requests.into_iter().zip(0..) {
            let Some(place) = places.split(1) else { return Err(ApiError::full(self.waiting())) };
            let (options, stop, replies) = (options.clone(), stop.to_vec(), sender.clone());
            let first_choice = number * options.samples;
            let deadline = since + self.timeout;
            let job = Job { request, options, stop, first_choice, replies, since, deadline, place };
            if !self.worker.submit(job) {
                return Err(ApiError::stopping());
            }
        }
        Ok(Submitted { replies, choices, samples: options.samples, prompt_tokens })
    }

    /// The request, unless it can never be answered. If the client does not say how long the answer may be, it is no
    /// longer than the pool is large.
    fn checked(&self, mut request: Request, shortens: bool) -> Result<Request, ApiError> {
        let never = |request: &Request| why_never(self.context, &self.cache, request, self.step_tokens);
        if shortens {
            let pool = self.cache.pool();
            let tokens = pool.units() / pool.units_per_block() * pool.block_size();
            // The last token needs no room.
            let left = (tokens + 1).saturating_sub(request.prompt.len()).max(1);
            request.max_tokens = request.max_tokens.min(left);
        }
        match never(&request) {
            None => Ok(request),
            Some(reason) => Err(ApiError::too_long(format!("the prompt {reason}"))),
        }
    }

    fn waiting(&self) -> usize {
        self.max_waiting - self.places.available_permits()
    }
}
