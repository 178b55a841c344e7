#!/usr/bin/env python3
"""Decodes what `crates/kv_events/examples/wire_format.rs` prints with the library that vLLM uses (msgspec), into
structures that have the fields of vLLM's, and checks the values. An unknown or missing field is an error."""

import sys
import time
from typing import Any

import msgspec


class Stored(msgspec.Struct, tag="BlockStored", forbid_unknown_fields=True):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class Removed(msgspec.Struct, tag="BlockRemoved", forbid_unknown_fields=True):
    block_hashes: list[int | bytes]
    medium: str | None
    group_idx: int | None = None


class Cleared(msgspec.Struct, tag="AllBlocksCleared", forbid_unknown_fields=True):
    pass


class Batch(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    ts: float
    events: list[Stored | Removed | Cleared]
    data_parallel_rank: int | None = None


decoder = msgspec.msgpack.Decoder(Batch)
plain, salted, cleared, groups = [decoder.decode(bytes.fromhex(line)) for line in sys.stdin]
for batch in (plain, salted, cleared, groups):
    assert abs(batch.ts - time.time()) < 3600, batch.ts

tokens = list(range(100_000, 100_032))
[first] = plain.events
names = first.block_hashes
assert len(set(names)) == 2 and all(0 <= name < 1 << 64 for name in names), names
assert first == Stored(names, None, tokens, 16, None, "GPU", None), first
assert plain.data_parallel_rank is None

removed, second = salted.events
assert removed == Removed(names[1:], "GPU"), removed
assert len({*names, *second.block_hashes}) == 4, second
assert second == Stored(second.block_hashes, None, tokens, 16, None, "GPU", None, [("tenant",), None]), second

assert cleared.events == [Cleared()], cleared

full, window = groups.events
assert groups.data_parallel_rank == 2
assert full == Stored(full.block_hashes, None, [0, 1, 2, 3], 4, None, "CPU", None, None, 0, "full_attention"), full
expected = Stored(full.block_hashes, None, [0, 1, 2, 3], 4, None, "CPU", None, None, 1, "sliding_window", 8)
assert window == expected, window
print("vLLM's structures decode the events")
