//! The interface that the replay drives: memory for tokens, with a scheduler that admits and preempts requests.

use std::time::Duration;

use anyhow::Result;

use super::request::Request;

/// An allocator and its scheduler.
pub(crate) trait Allocator<'a> {
    /// Adds a request to the queue.
    fn enqueue(&mut self, request: &'a Request);

    /// The number of waiting requests.
    fn waiting(&self) -> usize;

    /// One forward pass. Finished sequences leave, each running sequence grows by one token, waiting requests that fit
    /// start with their whole prompt, and every sequence generates a token. A sequence that finishes stays until the
    /// next step, so that `usage` after a step measures the sequences that the step computed.
    fn step(&mut self) -> Result<Step>;

    /// The contents of the memory after a step.
    fn usage(&self) -> Usage;
}

/// The counts of one step.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Step {
    /// Sequences that started, for the first time or after a preemption.
    pub(crate) started: usize,
    /// The numbers of the requests among them that started for the first time.
    pub(crate) first_started: Vec<u32>,
    /// Tokens computed for all of them.
    pub(crate) prefilled: usize,
    /// Of these, tokens that had been computed before and were lost when the sequence was preempted.
    pub(crate) recomputed: usize,
    /// Tokens generated: one for each running sequence.
    pub(crate) generated: usize,
    /// Sequences that were preempted.
    pub(crate) preempted: usize,
    /// Prompt tokens of the sequences that started for the first time.
    pub(crate) prompt_tokens: usize,
    /// Of these, tokens matched in the prefix cache.
    pub(crate) matched: usize,
    /// How often other requests were admitted ahead of one waiting request, at most.
    pub(crate) skipped: u32,
    /// The time of the bookkeeping; zero for models.
    pub(crate) bookkeeping: Duration,
}

/// The contents of the memory, in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Slots that hold a token of a running sequence; a slot that several sequences share counts once.
    pub(crate) live: usize,
    /// Slots that are set aside for running sequences.
    pub(crate) reserved: usize,
    /// Tokens of the running sequences; a shared token counts once for each sequence.
    pub(crate) logical: usize,
    /// Slots of evictable blocks: cached and not in use.
    pub(crate) evictable: usize,
    /// The number of running sequences.
    pub(crate) running: usize,
}

/// The size of the memory, the same for every allocator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pool {
    /// Slots.
    pub(crate) tokens: usize,
    /// The longest sequence that is accepted.
    pub(crate) max_len: usize,
}
