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
            let max_tokens = max_tokens.unwrap_or_else(|| self.longest_answer(&prompt));
            let request = Request { prompt, max_tokens };
            match why_never(self.context, &self.cache, &request, self.step_tokens) {
                None => requests.push(request),
                Some(reason) => return Err(ApiError::too_long(format!("the prompt {reason}"))),
            }
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

    /// The most tokens of an answer to this prompt, but at least 1: the model's context and the pool have room for them.
    fn longest_answer(&self, prompt: &[u32]) -> usize {
        let pool = self.cache.pool();
        let tokens = pool.units() / pool.units_per_block() * pool.block_size();
        // The last token needs no room in the pool.
        self.context.min(tokens + 1).saturating_sub(prompt.len()).max(1)
    }

    fn waiting(&self) -> usize {
        self.max_waiting - self.places.available_permits()
    }
}
