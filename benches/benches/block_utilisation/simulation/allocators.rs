//! The allocators that are compared, by name.

use anyhow::{Result, bail};

use super::allocator::{Allocator, Pool};
use super::contiguous::{Doubling, Known, MaximumLength, PowerOfTwo};
use super::first_come::FirstCome;
use super::paged_kv::PagedKv;
use super::sglang::Sglang;
use super::vllm::Vllm;

/// The allocators, by their names in the record.
pub(crate) const ALLOCATORS: [&str; 8] = [
    "contiguous_max",
    "contiguous_pow2",
    "contiguous_oracle",
    "contiguous_doubling",
    "sglang",
    "vllm",
    "paged_kv_fcfs",
    "paged_kv",
];

/// The block sizes of the allocators that have blocks.
pub(crate) const BLOCK_SIZES: [usize; 6] = [1, 8, 16, 32, 64, 128];

/// The block sizes to replay an allocator with; 1 for one that has no blocks.
pub(crate) fn block_sizes(allocator: &str) -> &'static [usize] {
    match allocator {
        "vllm" | "paged_kv" => &BLOCK_SIZES,
        "paged_kv_fcfs" => &[16],
        _ => &[1],
    }
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
        "paged_kv_fcfs" => Box::new(PagedKv::first_come(tokens, block_size)?),
        "paged_kv" => Box::new(PagedKv::new(tokens, block_size)?),
        _ => bail!("there is no allocator {name}; the allocators are {}", ALLOCATORS.join(", ")),
    })
}
