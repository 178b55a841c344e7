//! Attention on a CPU, over the blocks where they lie.
//!
//! - `boundary`: candle's tensors in, slices out; the only file here that knows candle.
//! - `jobs`: how a step is cut into tasks, and what becomes of them; `crew` is the threads that take them up.
//! - `careful`: rows whose result is not finite, computed again.
//! - `queries`: the rows of some new tokens, made ready.
//! - `algorithm`: online softmax over tiles of tokens, written once; `state` is what it knows of a row, `tile` where the
//!   tokens lie.
//! - `format`: f32, f16, bf16 and bytes, as stored, and the products over them.
//! - `wide`: sixteen numbers at a time, the one thing asked of an instruction set; `exp2` needs no more.
//! - `arch`: the instruction sets; `kernel` chooses one.

mod algorithm;
mod arch;
mod boundary;
mod careful;
mod crew;
mod exp2;
mod format;
mod jobs;
mod kernel;
mod queries;
mod state;
mod tile;
mod wide;

use block_pool::KvLayout;

pub(crate) use boundary::{attend, attend_part, like, read, write};
pub use kernel::Kernel;

use crate::Attention;
use crate::plan::Plan;

/// The most dimensions that 8-bit storage can have.
pub(crate) use format::MOST_INT8_DIMS;

/// What one call computes.
pub(crate) struct Call<'a> {
    pub(crate) layout: &'a KvLayout,
    pub(crate) plan: &'a Plan,
    /// Query heads.
    pub(crate) heads: usize,
    pub(crate) attention: &'a Attention,
    pub(crate) kernel: Kernel,
}
