//! The events as they are sent: MessagePack, as vLLM encodes its own (`vllm/distributed/kv_events.py`, since 0.24).

use std::time::SystemTime;

use serde::Serialize;

/// Where the bytes of a block are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Medium {
    /// The engine's own pool. Routers count it first, so a pool in host memory is best published as this, too, if the
    /// engine computes there.
    #[serde(rename = "GPU")]
    Gpu,
    /// Host memory.
    #[serde(rename = "CPU")]
    Cpu,
    /// A disk, or a store of several machines.
    #[serde(rename = "STORAGE")]
    Storage,
}

/// What the layers of a group keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SpecKind {
    /// All tokens.
    FullAttention,
    /// The tokens of a sliding window.
    SlidingWindow,
    /// The tokens of the current chunk.
    ChunkedLocalAttention,
}

/// What must match in addition to a block's tokens: salts.
pub type ExtraKeys = Vec<String>;

/// One event. With MessagePack a map with the field `type`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type")]
#[non_exhaustive]
pub enum Event {
    /// Full blocks became cached, each the parent of the next.
    BlockStored {
        /// A name for each block, which is the same as long as the block is cached.
        block_hashes: Vec<u64>,
        /// The name of the block before the first one, if there is one.
        parent_block_hash: Option<u64>,
        /// The tokens of all blocks, in order.
        token_ids: Vec<u32>,
        /// Tokens in a block.
        block_size: usize,
        /// Always `None`: an adapter is a salt here.
        lora_id: Option<u32>,
        /// Where the blocks are.
        medium: Medium,
        /// Always `None`.
        lora_name: Option<String>,
        /// For each block what must match in addition to its tokens, if anything.
        #[serde(skip_serializing_if = "Option::is_none")]
        extra_keys: Option<Vec<Option<ExtraKeys>>>,
        /// The group of layers, if there are several.
        #[serde(skip_serializing_if = "Option::is_none")]
        group_idx: Option<usize>,
        /// What the layers of the group keep, if it is not all tokens or there are several groups.
        #[serde(skip_serializing_if = "Option::is_none")]
        kv_cache_spec_kind: Option<SpecKind>,
        /// The tokens of the window, or of a chunk.
        #[serde(skip_serializing_if = "Option::is_none")]
        kv_cache_spec_sliding_window: Option<usize>,
    },
    /// Blocks are not cached any more.
    BlockRemoved {
        /// Their names.
        block_hashes: Vec<u64>,
        /// Where they were.
        medium: Medium,
        /// The group of layers, if there are several.
        #[serde(skip_serializing_if = "Option::is_none")]
        group_idx: Option<usize>,
    },
    /// No block is cached any more.
    AllBlocksCleared {},
}

/// What is sent at once.
#[derive(Debug, Clone, PartialEq)]
pub struct EventBatch {
    /// Seconds since 1970.
    pub ts: f64,
    /// The events, in order.
    pub events: Vec<Event>,
    /// The number of the engine among those that serve one model behind one address, if it has one.
    pub data_parallel_rank: Option<u32>,
}

impl EventBatch {
    /// A batch of this moment, without a rank.
    pub fn now(events: Vec<Event>) -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { ts: since.as_secs_f64(), events, data_parallel_rank: None }
    }

    /// The batch in MessagePack: an array of the time, the events and the rank.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut serializer = rmp_serde::Serializer::new(&mut bytes).with_struct_map();
        let batch = (self.ts, &self.events, self.data_parallel_rank);
        // Writing to a vector of bytes does not fail, and no event has a value that MessagePack lacks.
        let encoded = batch.serialize(&mut serializer);
        debug_assert!(encoded.is_ok());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What vLLM's own structs encode for these events.
    const REFERENCE: &str = "93cb3ff800000000000093de0008a474797065ab426c6f636b53746f726564ac626c6f636b5f686173686573\
        9101b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473920102aa626c6f636b5f73697a6502a76c6f72615f6964\
        c0a66d656469756da3435055a96c6f72615f6e616d65c083a474797065ac426c6f636b52656d6f766564ac626c6f636b5f6861736865\
        739101a66d656469756da343505581a474797065b0416c6c426c6f636b73436c656172656400";

    #[test]
    fn the_bytes_are_those_of_vllm() {
        let stored = Event::BlockStored {
            block_hashes: vec![1],
            parent_block_hash: None,
            token_ids: vec![1, 2],
            block_size: 2,
            lora_id: None,
            medium: Medium::Cpu,
            lora_name: None,
            extra_keys: None,
            group_idx: None,
            kv_cache_spec_kind: None,
            kv_cache_spec_sliding_window: None,
        };
        let removed = Event::BlockRemoved { block_hashes: vec![1], medium: Medium::Cpu, group_idx: None };
        let batch = EventBatch {
            ts: 1.5,
            events: vec![stored, removed, Event::AllBlocksCleared {}],
            data_parallel_rank: Some(0),
        };
        let bytes = batch.encode();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        // A map of eight may be written with one byte or, as msgspec does where fields can be left out, with three.
        assert_eq!(hex, REFERENCE.replace("de0008", "88"));
    }
}
