//! Answers many prompts at once with a real language model, from one paged KV cache.
//!
//! [`prompts`] reads the prompts, [`run`] goes from the arguments to the results, and [`report`] shows them. [`measure`]
//! measures the speed. The model, the tokenizer and the engine are in the library [`inference`].

pub mod args;
mod live;
pub mod measure;
mod output;
pub mod prompts;
pub mod report;
pub mod run;

#[cfg(feature = "verify")]
mod verify;
