#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod admission;
mod error;
mod places;
mod sequences;
mod swap;
mod sync;
mod table;

pub use admission::{Admission, Admitted, Need, Room};
pub use block_pool::{
    BlockId, BlockPool, BlockState, Found, OutOfBlocks, PoolError, PoolEvent, PoolEvents, PrefixKey, ReserveError,
    Salt, Snapshot, Stats, StorageError, Window,
};
pub use error::{BehindWindow, NotReserved};
pub use sequences::{SequenceError, SequenceId, Sequences, Taken};
pub use swap::SwappedTable;
pub use table::{BlockTable, TableOptions};
