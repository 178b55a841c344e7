//! Attention on a CPU, over the blocks where they lie.
//!
//! - `boundary`: candle's tensors in, slices out; the only file here that knows candle.
//! - `algorithm`: online softmax over tiles of tokens, written once.
//! - `element`: f32, f16, bf16, as stored.
//! - `exp`: the exponential.
//! - `kernel`: the instruction sets, and which one runs.
//! - `prefetch`: asks for memory before it is needed.

mod algorithm;
mod boundary;
mod element;
mod exp;
mod kernel;
mod prefetch;

pub(crate) use boundary::{Call, attend, write};
pub use kernel::Kernel;
