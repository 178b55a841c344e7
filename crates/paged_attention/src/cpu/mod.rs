//! Attention on a CPU that reads keys and values from the blocks in place.
//!
//! - `boundary`: converts candle's tensors to slices and back; the only file here that uses candle.
//! - `tasks`: splits a step into tasks; `shared` finds the sequences that read the same blocks.
//! - `jobs`: runs tasks; `merged` merges their results; `crew` has the threads.
//! - `recompute`: recomputes rows whose result is not finite.
//! - `queries`: packs the query rows of new tokens for the kernels.
//! - `algorithm`: online softmax over tiles of tokens, written once for all formats and instruction sets; `state` has
//!   the running maximum, running sum and accumulators of each row, `tile` finds the keys and values of a
//!   tile, whose shape is in `panels`.
//! - `format`: f32, f16, bf16 and int8 storage, and the products over it.
//! - `wide`: the trait that each instruction set implements, a vector of sixteen lanes; `exp2` is written with it.
//! - `arch`: the instruction sets; `kernel` chooses one.

mod algorithm;
mod arch;
mod boundary;
mod crew;
mod exp2;
mod format;
mod jobs;
mod kernel;
mod merged;
mod panels;
mod queries;
mod recompute;
mod shared;
mod state;
mod tasks;
mod tile;
mod wide;

use block_pool::{KvDtype, KvLayout};

pub(crate) use boundary::{attend, attend_part, attend_with_lse, like, read, write};
pub use kernel::Kernel;
pub(crate) use shared::Shared;

use crate::plan::Plan;
use crate::{Attention, CacheError};

/// Checks that keys of this many dimensions can be stored in this type.
pub(crate) fn check_dims(dtype: KvDtype, head_dim: usize) -> Result<(), CacheError> {
    match dtype {
        KvDtype::Int8 if head_dim > format::MOST_INT8_DIMS => {
            Err(CacheError::TooManyDimensions { head_dim, most: format::MOST_INT8_DIMS })
        }
        _ => Ok(()),
    }
}

/// The parameters of one call.
pub(crate) struct Call<'a> {
    pub(crate) layout: &'a KvLayout,
    pub(crate) plan: &'a Plan,
    /// Query heads.
    pub(crate) heads: usize,
    pub(crate) attention: &'a Attention,
    pub(crate) kernel: Kernel,
}
