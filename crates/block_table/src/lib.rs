#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod admission;
mod error;
mod places;
mod sequences;
mod swap;
mod sync;
mod table;
mod window;

pub use admission::{Admission, Admitted, Need, Room};
pub use block_pool::{
    BlockId, BlockPool, BlockState, OutOfBlocks, PoolError, PoolEvent, ReserveError, Salt, Snapshot, Stats,
    StorageError,
};
pub use error::{BehindWindow, NotReserved};
pub use sequences::{SequenceError, SequenceId, Sequences, Taken};
pub use swap::SwappedTable;
pub use table::{BlockTable, Found, TableOptions};
pub use window::Window;
