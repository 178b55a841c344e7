#![doc = include_str!("../README.md")]

mod attention;
mod backend;
mod builder;
mod cache;
mod cpu;
mod cross;
mod dense;
mod error;
mod foreign;
mod gather;
mod group;
mod kv_layer;
mod layers;
mod merge;
mod metadata;
mod plan;
mod push_options;
mod segments;
mod step;
mod validate;
mod wrap;

pub use attention::Attention;
pub use builder::{Backend, KvCacheBuilder};
pub use cache::KvCache;
pub use cpu::Kernel;
pub use error::{CacheError, CommitError, PushError};
pub use foreign::{paged_attention, paged_attention_with_lse, reshape_and_cache};
pub use group::LayerGroup;
pub use kv_layer::KvLayer;
pub use merge::merge_states;
pub use metadata::StepMetadata;
pub use push_options::{Logits, PushOptions};
pub use segments::{Segment, attend_segments};
pub use step::Step;
pub use validate::AttendError;
pub use wrap::{find_error, wrap_error};

pub use block_pool::{
    BYTE_STRIP, BlockId, BlockPool, BlockState, GroupBlock, GroupBlocks, Inconsistent, KvDtype, KvEvent, KvEvents,
    KvLayout, KvShape, Offload, OffloadError, OffloadOptions, OffloadStats, Order, OutOfBlocks, PANEL, PoolError,
    PoolGroup, PrefixKey, PrefixMatch, QUAD, ReserveError, STRIP, Salt, SaltFrom, Snapshot, Span, Stats, StorageError,
};
pub use block_table::{
    Admission, Admitted, BlockTable, CheckedOut, FetchLimits, FetchedPrefix, Need, NotReserved, OutOfWindow,
    PrefixReader, Room, SaltTooLate, SequenceError, SequenceId, Sequences, StoredPrefix, SwappedTable, TableOptions,
    Tier, TierCursor, TierPlace, TierWatcher, Window, preemption_victim,
};
