//! Answers at once, when everything is complete.

use inference::engine::Logprobs;

use super::error::ApiError;
use super::submit::Submitted;
use crate::worker::Reply;

/// One complete answer.
#[derive(Debug, Default)]
pub(super) struct Choice {
    pub(super) text: String,
    pub(super) reason: &'static str,
    pub(super) logprobs: Vec<(u32, Logprobs)>,
}

/// The numbers of tokens of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Usage {
    prompt_tokens: usize,
    tokens: usize,
    cached_tokens: usize,
    /// Answers to each prompt.
    samples: usize,
    /// Answers that are complete.
    pub(super) complete: usize,
}

impl Usage {
    pub(super) fn of(submitted: &Submitted) -> Self {
        let Submitted { prompt_tokens, samples, .. } = *submitted;
        Self { prompt_tokens, tokens: 0, cached_tokens: 0, samples, complete: 0 }
    }

    /// Adds a complete answer. What was cached of a prompt is what its first answer found: the others have it from that.
    pub(super) fn add(&mut self, choice: usize, tokens: usize, cached_tokens: usize) {
        self.tokens += tokens;
        self.cached_tokens += if choice.is_multiple_of(self.samples) { cached_tokens } else { 0 };
        self.complete += 1;
    }

    pub(super) fn json(self) -> serde_json::Value {
        let Self { prompt_tokens, tokens, cached_tokens, .. } = self;
        serde_json::json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
            "prompt_tokens_details": { "cached_tokens": cached_tokens },
        })
    }
}

/// All answers to a request.
pub(super) async fn collect(mut submitted: Submitted) -> Result<(Vec<Choice>, Usage), ApiError> {
    let mut choices: Vec<Choice> = (0..submitted.choices).map(|_| Choice::default()).collect();
    let mut usage = Usage::of(&submitted);
    while usage.complete < submitted.choices {
        match submitted.replies.recv().await {
            Some(Reply::Piece { choice, text, logprobs }) => {
                choices[choice].text += &text;
                choices[choice].logprobs.extend(logprobs);
            }
            Some(Reply::Finished { choice, reason, tokens, cached_tokens }) => {
                choices[choice].reason = reason;
                usage.add(choice, tokens, cached_tokens);
            }
            Some(Reply::Failed(failure)) => return Err(ApiError::failed(failure)),
            None => return Err(ApiError::stopping()),
        }
    }
    Ok((choices, usage))
}
