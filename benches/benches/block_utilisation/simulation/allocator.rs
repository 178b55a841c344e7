//! What the replay drives: memory for tokens, with its way of admitting requests and of taking memory back.

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
    /// A request arrives.
    fn enqueue(&mut self, request: &'a Request);

    /// How many requests wait.
    fn waiting(&self) -> usize;

    /// One forward pass: whoever is done leaves, whoever runs grows by one token, whoever fits starts with all its
    /// prompt, and each of them generates a token. Those who are done stay until the next step, so that what is measured
    /// after a step is what the step computed over.
    fn step(&mut self) -> Result<Step>;

    /// What the memory holds after a step.
    fn usage(&self) -> Usage;
}

/// What one step did.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Step {
    /// Sequences that started, or started again.
    pub(crate) started: usize,
    /// Tokens computed for these.
    pub(crate) prefilled: usize,
    /// Of these, tokens that had been computed before and were lost when the sequence had to yield.
    pub(crate) recomputed: usize,
    /// Tokens generated: one for each sequence that runs.
    pub(crate) generated: usize,
    /// Sequences that had to yield.
    pub(crate) preempted: usize,
    /// Prompt tokens of those who started for the first time.
    pub(crate) prompt_tokens: usize,
    /// Of these, tokens found in the cache.
    pub(crate) found: usize,
    /// How often others have gone ahead of one waiting request, at most.
    pub(crate) skipped: u32,
    /// Time spent in the books, where they are real.
    pub(crate) bookkeeping: Duration,
}

/// What the memory holds, in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Token places that hold a token of a running sequence; one that several share counts once.
    pub(crate) live: usize,
    /// Token places that are set aside for running sequences.
    pub(crate) reserved: usize,
    /// Tokens of the running sequences, shared ones counted for each.
    pub(crate) logical: usize,
    /// Places of tokens that nobody uses and that can be found again.
    pub(crate) remembered: usize,
    /// How many sequences run.
    pub(crate) running: usize,
}

/// The memory that everybody gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pool {
    /// Token places.
    pub(crate) tokens: usize,
    /// The longest sequence that is accepted.
    pub(crate) max_len: usize,
}

/// By the names they have in the record.
pub(crate) const ALLOCATORS: [&str; 7] =
    ["contiguous_max", "contiguous_pow2", "contiguous_oracle", "contiguous_doubling", "sglang", "vllm", "paged_kv"];

/// The block sizes of those who have blocks.
pub(crate) const BLOCK_SIZES: [usize; 6] = [1, 8, 16, 32, 64, 128];

/// The block sizes to replay an allocator with: 1 for those who have no blocks.
pub(crate) fn block_sizes(allocator: &str) -> &'static [usize] {
    if matches!(allocator, "vllm" | "paged_kv") { &BLOCK_SIZES } else { &[1] }
}

/// An allocator by its name.
///
/// # Errors
///
/// An unknown name; a pool too small for one sequence of the maximum length, or that the real pool refuses.
pub(crate) fn allocator<'a>(name: &str, pool: Pool, block_size: usize) -> Result<Box<dyn Allocator<'a> + 'a>> {
    let Pool { tokens, max_len } = pool;
    if max_len > tokens / block_size * block_size {
        bail!("one sequence may have {max_len} tokens, the pool has room for {tokens} in blocks of {block_size}");
    }
    Ok(match name {
        "contiguous_max" => Box::new(FirstCome::new(MaximumLength::new(pool))),
        "contiguous_pow2" => Box::new(FirstCome::new(PowerOfTwo::new(pool)?)),
        "contiguous_oracle" => Box::new(FirstCome::new(Known::new(tokens))),
        "contiguous_doubling" => Box::new(FirstCome::new(Doubling::new(pool))),
        "sglang" => Box::new(FirstCome::new(Sglang::new(tokens))),
        "vllm" => Box::new(FirstCome::new(Vllm::new(tokens, block_size))),
        "paged_kv" => Box::new(PagedKv::new(tokens, block_size)?),
        _ => bail!("no allocator is called {name}; there are {}", ALLOCATORS.join(", ")),
    })
}
