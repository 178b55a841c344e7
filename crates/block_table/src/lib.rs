#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod admission;
mod error;
mod out_of_order;
mod sequences;
mod swap;
mod sync;
mod table;
mod tiers;

pub use admission::{Admission, Admitted, Need, Room, preemption_victim};
pub use block_pool::{
    BlockId, BlockPool, BlockState, GroupBlock, GroupBlocks, KvEvent, KvEvents, Offload, OffloadError, OffloadOptions,
    OffloadStats, OutOfBlocks, OutOfWindow, PoolError, PoolGroup, PrefixKey, PrefixMatch, ReserveError, Salt, SaltFrom,
    Snapshot, Span, Stats, StorageError, Tier, TierCursor, TierPlace, TierWatcher, Window,
};
pub use error::{NotReserved, SaltTooLate};
pub use sequences::{CheckedOut, SequenceError, SequenceId, Sequences};
pub use swap::SwappedTable;
pub use table::{BlockTable, TableOptions};
pub use tiers::{FetchLimits, FetchedPrefix, PrefixReader, StoredPrefix};
