//! Answers many prompts at once with a real language model, out of one paged KV cache.
//!
//! A prompt's way: [`model_file`] finds the model, [`config`] has its numbers, [`tokenizer`] and [`chat`] turn the prompt
//! into tokens, the [`engine`] keeps as many sequences running as fit into the pool, [`model`] computes one step for all
//! of them (its matrices as [`weights`] holds them), [`sampling`] picks their next tokens, and [`report`] shows what came
//! of it. [`measure`] says how fast all that is.

pub mod args;
pub mod chat;
pub mod config;
pub mod engine;
mod gguf;
mod header;
pub mod measure;
mod memory;
mod metadata;
pub mod model;
pub mod model_file;
mod output;
pub mod prompts;
pub mod report;
pub mod run;
pub mod sampling;
pub mod shown;
mod specials;
pub mod tokenizer;
mod used;
pub mod weights;

#[cfg(feature = "verify")]
pub mod candle_loop;
#[cfg(feature = "verify")]
mod scenarios;
