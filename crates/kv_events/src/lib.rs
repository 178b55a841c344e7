// Its example needs the sockets.
#![cfg_attr(feature = "zmq", doc = include_str!("../README.md"))]
#![cfg_attr(
    not(feature = "zmq"),
    doc = "KV events for routers, in the format that vLLM publishes. Without the feature `zmq`:"
)]
#![cfg_attr(
    not(feature = "zmq"),
    doc = "KV events in the format of vLLM's; without the feature `zmq`, so without sockets."
)]
//!
//! With another transport, or without threads:
//!
//! ```
//! use block_pool::BlockPool;
//! use kv_events::{EventBatch, Translator};
//!
//! let pool = BlockPool::new(8, 16)?;
//! // With at most so many events that wait; when there are more, it begins again with all that is cached.
//! let mut events = pool.subscribe_within(10_000);
//! let mut translator = Translator::of(&pool);
//! // In a loop, or after every step:
//! let batch = EventBatch::now(translator.translate(events.try_iter()));
//! let bytes = batch.encode();
//! # assert!(batch.events.is_empty() && bytes.len() > 10);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod described;
mod name;
#[cfg(feature = "zmq")]
mod publisher;
mod tier;
mod translate;
mod wire;

#[cfg(feature = "zmq")]
pub use publisher::{PublishError, Publisher, PublisherBuilder};
pub use tier::PublishedTier;
pub use translate::Translator;
pub use wire::{Event, EventBatch, ExtraKeys, Medium, SpecKind};
