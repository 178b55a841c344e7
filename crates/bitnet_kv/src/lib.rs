#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod compress;
mod error;
mod options;
mod paged;
mod part;
mod pool;
mod read;
mod rows;
mod sequence;
mod stats;
mod stores;
mod update;

pub use error::KvError;
pub use options::{CacheOptions, Overflow};
pub use paged::{PagedKVCache, PagedLayerKVCache};
pub use pool::{PagedKVPool, PagedKVPoolBuilder};
pub use stats::CacheStats;
pub use update::{KVCache, KVCacheOptions};

pub use paged_attention::{KvDtype, KvShape, OutOfBlocks, Salt};

/// The page whose examples are compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/bitnet-inference.md")]
mod page {}
