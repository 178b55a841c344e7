//! What the tests need: engines that compute prompts and publish what they cache, and a router that follows them.

mod engine;
mod router;

pub use engine::Engine;
pub use router::{Follower, Index};

/// Tokens in a block.
pub const BLOCK_SIZE: usize = 4;
