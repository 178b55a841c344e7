//! KV events for routers: what a pool has cached, in the format that vLLM publishes.
//!
//! A router in front of several engines sends each request to the engine that holds the longest part of its prompt. It
//! learns what they hold from their events. vLLM's format has become the common one: NVIDIA Dynamo's router and llm-d
//! read it. This crate turns the [`KvEvent`]s of a [`BlockPool`] into these events ([`Translator`]), and the events into
//! bytes ([`EventBatch::encode`]). With the feature `zmq` a `Publisher` sends them over ZeroMQ.
//!
//! ```
//! use block_pool::BlockPool;
//! use kv_events::{EventBatch, Translator};
//!
//! let pool = BlockPool::new(8, 16)?;
//! let mut events = pool.subscribe();
//! let mut translator = Translator::of(&pool);
//! // In a loop, or after every step:
//! let batch = EventBatch::now(translator.translate(events.try_iter()));
//! let bytes = batch.encode();
//! # assert!(batch.events.is_empty() && bytes.len() > 10);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`KvEvent`]: block_pool::KvEvent
//! [`BlockPool`]: block_pool::BlockPool

mod name;
#[cfg(feature = "zmq")]
mod publisher;
mod translate;
mod wire;

#[cfg(feature = "zmq")]
pub use publisher::{PublishError, Publisher, PublisherBuilder};
pub use translate::Translator;
pub use wire::{Event, EventBatch, ExtraKeys, Medium, SpecKind};
