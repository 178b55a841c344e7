#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod sequences;
mod table;

pub use block_pool::{BlockId, BlockPool, OutOfBlocks, PoolError, ReserveError, StorageError};
pub use sequences::{SequenceError, SequenceId, Sequences, Taken};
pub use table::{BlockTable, NotReserved};
