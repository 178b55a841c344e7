#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod below;
mod compress;
mod contiguous;
mod enlarge;
mod error;
mod options;
mod paged;
mod pass;
mod pool;
mod read;
mod rows;
mod segment;
mod sequence;
mod stats;
mod stores;
mod update;

pub use error::KvError;
pub use options::{CacheOptions, KVCacheOptions, Overflow};
pub use paged::{PagedKVCache, PagedLayerKVCache};
pub use pool::{PagedKVPool, PagedKVPoolBuilder};
pub use stats::{BlocksInUse, CacheStats};
pub use update::KVCache;

pub use paged_attention::{
    CacheError, FetchLimits, KvDtype, KvShape, OffloadOptions, OffloadStats, OutOfBlocks, OutOfWindow, Salt,
    StorageError, Tier,
};
