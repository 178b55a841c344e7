//! Answers many prompts at once with a real language model, from one paged KV cache.
//!
//! The path of a prompt: [`model_file`] obtains the model, [`config`] has what its file says, [`tokenizer`] and [`chat`]
//! turn the prompt into tokens, [`engine`] runs as many sequences as fit into the pool, [`model`] computes one step for
//! all of them (with its matrices in memory as [`weights`] says), [`sampling`] draws their next tokens, and [`report`]
//! shows the results. [`measure`] measures the speed.

mod architecture;
pub mod args;
pub mod chat;
pub mod config;
pub mod engine;
mod gguf;
mod header;
mod live;
pub mod measure;
mod memory;
mod metadata;
pub mod model;
pub mod model_file;
mod output;
pub mod prompts;
pub mod report;
mod rope;
pub mod run;
pub mod sampling;
pub mod shown;
mod specials;
mod tensors;
pub mod tokenizer;
mod used;
pub mod weights;

#[cfg(feature = "verify")]
mod verify;
