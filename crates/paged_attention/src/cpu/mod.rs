//! Attention on a CPU that reads keys and values from the blocks in place.
//!
//! - `boundary`: converts candle's tensors to slices and back; the only file here that uses candle.
//! - `jobs`: splits a step into tasks, and merges their results; `crew` runs them on several threads.
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
mod panels;
mod queries;
mod recompute;
mod state;
mod tile;
mod wide;

use block_pool::KvLayout;

pub(crate) use boundary::{attend, attend_part, like, read, write};
pub use kernel::Kernel;

use crate::Attention;
use crate::plan::Plan;

/// The largest `head_dim` of 8-bit storage.
pub(crate) use format::MOST_INT8_DIMS;

/// The parameters of one call.
pub(crate) struct Call<'a> {
    pub(crate) layout: &'a KvLayout,
    pub(crate) plan: &'a Plan,
    /// Query heads.
    pub(crate) heads: usize,
    pub(crate) attention: &'a Attention,
    pub(crate) kernel: Kernel,
}
