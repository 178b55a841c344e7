//! Pools with several groups of layers, scenario by scenario: what is found, what is freed and evicted, what is copied,
//! and how the groups share one budget.
//!
//! The scenarios of `matching` and `spans` include those of vLLM's tests of hybrid models, in this pool's terms.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod support;

mod budget;
mod eviction;
mod history;
mod matching;
mod spans;
mod transactions;
