#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod blocks;
mod error;
mod free;
mod id;
mod layout;
mod ledger;
mod pool;
mod storage;

#[cfg(feature = "candle")]
mod tensors;

pub use blocks::Blocks;
pub use error::{Inconsistent, OutOfBlocks, PoolError, ReserveError, StorageError};
pub use id::BlockId;
pub use layout::{KvLayout, KvShape, Order};
pub use pool::BlockPool;
pub use storage::BlockStorage;

#[cfg(feature = "candle")]
pub use tensors::KvTensors;
