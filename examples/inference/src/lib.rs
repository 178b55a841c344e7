//! What the examples that run language models have in common.
//!
//! The path of a prompt: [`model_file`] obtains the model, [`config`] has what its file says, [`tokenizer`] and [`chat`]
//! turn the prompt into tokens, [`engine`] runs as many sequences as fit into the pool, [`model`] computes one step for
//! all of them (with its matrices in memory as [`weights`] says), and [`sampling`] draws their next tokens. [`flags`] are
//! the command line arguments that all programs have.

pub mod architecture;
pub mod chat;
pub mod config;
pub mod engine;
pub mod flags;
mod gguf;
mod header;
pub mod median;
pub mod memory;
mod metadata;
pub mod model;
pub mod model_file;
pub mod program;
pub mod rope;
pub mod sampling;
pub mod setup;
pub mod shown;
mod specials;
mod tensors;
pub mod tokenizer;
mod used;
pub mod weights;
