//! The interface that the replay drives: memory for tokens, with a scheduler that admits and preempts requests.

use std::time::Duration;

use anyhow::{Result, bail};

use super::contiguous::{Doubling, Known, MaximumLength, PowerOfTwo};
use super::first_come::FirstCome;
use super::paged_kv::PagedKv;
use super::request::Request;
use super::sglang::Sglang;
use super::vllm::Vllm;

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
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Step {
    /// Sequences that started, for the first time or after a preemption.
    pub(crate) started: usize,
    /// Tokens computed for these.
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

/// The allocators, by their names in the record.
pub(crate) const ALLOCATORS: [&str; 7] =
    ["contiguous_max", "contiguous_pow2", "contiguous_oracle", "contiguous_doubling", "sglang", "vllm", "paged_kv"];

/// The block sizes of the allocators that have blocks.
pub(crate) const BLOCK_SIZES: [usize; 6] = [1, 8, 16, 32, 64, 128];

/// The block sizes to replay an allocator with; 1 for one that has no blocks.
pub(crate) fn block_sizes(allocator: &str) -> &'static [usize] {
    if matches!(allocator, "vllm" | "paged_kv") { &BLOCK_SIZES } else { &[1] }
}

/// Creates the allocator with this name.
///
/// # Errors
///
/// If the name is unknown, the pool is too small for one sequence of the maximum length, or [`BlockPool::new`] fails.
///
/// [`BlockPool::new`]: paged_attention::BlockPool::new
pub(crate) fn allocator<'a>(name: &str, pool: Pool, block_size: usize) -> Result<Box<dyn Allocator<'a> + 'a>> {
    let Pool { tokens, max_len } = pool;
    if max_len > tokens / block_size * block_size {
        bail!("one sequence may have {max_len} tokens, more than a pool of {tokens} tokens in blocks of {block_size}");
    }
    Ok(match name {
        "contiguous_max" => Box::new(FirstCome::new(MaximumLength::new(pool))),
        "contiguous_pow2" => Box::new(FirstCome::new(PowerOfTwo::new(pool)?)),
        "contiguous_oracle" => Box::new(FirstCome::new(Known::new(tokens))),
        "contiguous_doubling" => Box::new(FirstCome::new(Doubling::new(pool))),
        "sglang" => Box::new(FirstCome::new(Sglang::new(tokens))),
        "vllm" => Box::new(FirstCome::new(Vllm::new(tokens, block_size))),
        "paged_kv" => Box::new(PagedKv::new(tokens, block_size)?),
        _ => bail!("there is no allocator {name}; the allocators are {}", ALLOCATORS.join(", ")),
    })
}
