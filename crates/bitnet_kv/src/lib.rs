#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod compress;
mod contiguous;
mod enlarge;
mod error;
mod options;
mod paged;
mod part;
mod pass;
mod pool;
mod read;
mod rows;
mod sequence;
mod stats;
mod stores;
mod update;

pub use error::KvError;
pub use options::{CacheOptions, KVCacheOptions, Overflow};
pub use paged::{PagedKVCache, PagedLayerKVCache};
pub use pool::{PagedKVPool, PagedKVPoolBuilder};
pub use stats::CacheStats;
pub use update::KVCache;

pub use paged_attention::{BehindWindow, CacheError, KvDtype, KvShape, OutOfBlocks, Salt, StorageError};

/// The page whose examples are compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/bitnet-inference.md")]
mod page {}
