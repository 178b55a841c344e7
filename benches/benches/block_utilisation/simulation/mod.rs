//! Replays a serving workload through allocators, to measure how much of the pool holds tokens and what it costs to
//! keep the pool full.

pub(crate) mod allocator;
mod allocators;
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
mod trace;
mod vllm;

pub(crate) use allocator::Pool;
pub(crate) use allocators::{ALLOCATORS, BLOCK_SIZES, allocator, block_sizes};
pub(crate) use built_in::built_in;
pub(crate) use replay::{Arrivals, replay};
pub(crate) use request::Request;
pub(crate) use tally::{Outcome, Sample};
pub(crate) use trace::read_trace;
