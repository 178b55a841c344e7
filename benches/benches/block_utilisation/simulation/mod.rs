//! Replays a serving workload through allocators, to measure how much of the pool holds tokens and what it costs to
//! keep the pool full.

pub(crate) mod allocator;
mod azure;
mod buddies;
mod built_in;
mod contiguous;
mod first_come;
mod mooncake;
pub(crate) mod paged_kv;
mod quantiles;
mod regions;
mod replay;
mod request;
mod sglang;
mod tally;
mod vllm;

pub(crate) use allocator::{ALLOCATORS, BLOCK_SIZES, Pool, allocator, block_sizes};
pub(crate) use built_in::built_in;
pub(crate) use replay::{Arrivals, replay};
pub(crate) use request::{Request, read_trace};
pub(crate) use tally::{Outcome, Sample};
