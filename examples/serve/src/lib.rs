//! Serves a language model over OpenAI's API, from one paged KV cache.
//!
//! [`run`] goes from the arguments to a listening server. A request is read and answered by [`api`], which is
//! asynchronous. Everything that is computed is computed by [`worker`], one thread that steps the engine and sends each
//! request what its answers have become; [`text`] turns tokens into text and finds where an answer is to stop.
//! [`metrics`] counts.

pub mod api;
pub mod args;
pub mod metrics;
pub mod run;
pub mod text;
pub mod worker;
