#![doc = include_str!("../README.md")]

mod blocks;
mod dtype;
mod error;
mod events;
mod eviction;
mod free;
mod group;
mod id;
mod key;
mod layout;
mod ledger;
mod list;
mod observe;
mod offload;
mod pool;
mod prefix;
mod salt;
mod shape;
mod snapshot;
mod span;
mod stats;
mod storage;
mod swap;
mod sync;
mod tier;
mod window;

#[cfg(feature = "candle")]
mod pages;
#[cfg(feature = "candle")]
mod tensors;

pub use blocks::{Blocks, CachedPrefix};
pub use dtype::KvDtype;
pub use error::{
    AlreadyCached, Inconsistent, OffloadError, OutOfBlocks, OutOfWindow, PoolError, ReserveError, StorageError,
};
pub use events::{KvEvent, KvEvents};
pub use group::{GroupBlock, GroupBlocks, PoolGroup};
pub use id::BlockId;
pub use key::PrefixKey;
pub use layout::{BYTE_STRIP, KvLayout, Order, PANEL, QUAD, STRIP};
pub use observe::PoolMetrics;
pub use offload::{Offload, OffloadOptions, OffloadStats};
pub use pool::BlockPool;
pub use salt::{Salt, SaltFrom};
pub use shape::KvShape;
pub use snapshot::{BlockState, Snapshot};
pub use span::Span;
pub use stats::{PrefixMatch, Stats};
pub use storage::BlockStorage;
pub use swap::SwappedBlocks;
pub use tier::{Tier, TierCursor, TierPlace, TierWatcher};
pub use window::Window;

#[cfg(feature = "candle")]
pub use tensors::KvTensors;
