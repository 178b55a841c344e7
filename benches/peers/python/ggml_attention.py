"""ggml's flash attention, from the libraries inside llama-cpp-python.

Sequences that begin alike have copies of what they share, or are rows over one buffer with the tokens of all of them
(llama.cpp's unified cache), with a mask that hides the tokens of the others."""

import ctypes
import importlib.util
import os
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from importlib.metadata import version
from pathlib import Path

import numpy as np
from protocol import clocked, layers_of_copies, numbers, serve

THREADS = int(os.environ["OMP_NUM_THREADS"])
# Values of `enum ggml_type`, and of `enum ggml_prec`.
F32, F16, Q8_0, BF16 = 0, 1, 8, 30
TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "int8": Q8_0}
PRECISION_F32 = 10


def library(name):
    folder = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
    return ctypes.CDLL(str(folder / f"lib{name}.so"))


base, cpu = library("ggml-base"), library("ggml-cpu")


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def declare(owner, name, result, *arguments):
    function = getattr(owner, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


init = declare(base, "ggml_init", c_void_p, InitParams)
free = declare(base, "ggml_free", None, c_void_p)
new_tensor = declare(base, "ggml_new_tensor_4d", c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64, c_int64)
permute = declare(base, "ggml_permute", c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int)
attention = declare(
    base, "ggml_flash_attn_ext", c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_float, c_float
)
precision = declare(base, "ggml_flash_attn_ext_set_prec", None, c_void_p, c_int)
new_graph = declare(base, "ggml_new_graph", c_void_p, c_void_p)
expand = declare(base, "ggml_build_forward_expand", None, c_void_p, c_void_p)
data = declare(base, "ggml_get_data", c_void_p, c_void_p)
nbytes = declare(base, "ggml_nbytes", c_size_t, c_void_p)
graph_overhead = declare(base, "ggml_graph_overhead", c_size_t)
quantize = declare(
    base, "ggml_quantize_chunk", c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)
)
backend_init = declare(cpu, "ggml_backend_cpu_init", c_void_p)
set_threads = declare(cpu, "ggml_backend_cpu_set_n_threads", None, c_void_p, c_int)
compute = declare(base, "ggml_backend_graph_compute", c_int, c_void_p, c_void_p)

backend = backend_init()
set_threads(backend, THREADS)
contexts = []


def converted(numbers, dtype):
    """Returns `numbers` as the bytes of a ggml type."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    if dtype == F32:
        return numbers.view(np.uint8).reshape(-1)
    if dtype == F16:
        return numbers.astype(np.float16).view(np.uint8).reshape(-1)
    row = numbers.shape[-1]
    out = np.empty(numbers.size * 2, dtype=np.uint8)
    size = quantize(dtype, numbers.ctypes.data, out.ctypes.data, 0, numbers.size // row, row, None)
    return out[:size]


def fill(tensor, data_bytes):
    assert nbytes(tensor) == data_bytes.size, (nbytes(tensor), data_bytes.size)
    ctypes.memmove(data(tensor), data_bytes.ctypes.data, data_bytes.size)


def prepare(case, variant):
    sequences, context_tokens, heads = case["batch"], case["context"], case["heads"]
    kv_heads, dim, dtype = case["kv_heads"], case["head_dim"], TYPES[case["dtype"]]
    causal = case["kind"] == "prefill"
    unified = variant.startswith("unified")
    head_major = variant.endswith("head-major")
    # For each token of a buffer its position in a sequence.
    positions = np.arange(context_tokens)
    if unified:
        own = positions[case["prefix"] :]
        positions = np.concatenate((positions[: case["prefix"]], np.tile(own, sequences)))
    tokens = len(positions)
    # The buffers, and the rows of each.
    batch = 1 if unified else sequences
    rows = tokens if causal else sequences // batch
    layers = case["layers"]
    if not unified:
        layers = layers_of_copies(case, converted(np.zeros((1, 32)), dtype).size / 32)

    keys_and_values = []
    for kind in "kv":
        x = numbers(kind, context_tokens * kv_heads * dim).reshape(1, context_tokens, kv_heads, dim)[:, positions]
        if head_major:
            x = x.transpose(0, 2, 1, 3)
        keys_and_values.append(np.tile(converted(x, dtype), batch))
    q_numbers = numbers("q", (tokens if causal else 1) * heads * dim).reshape(1, -1, heads, dim)
    q_numbers = np.tile(q_numbers, (1, rows // q_numbers.shape[1], 1, 1)).transpose(0, 2, 1, 3)
    q_numbers = np.tile(q_numbers, (batch, 1, 1, 1))

    each = 2 * keys_and_values[0].size + batch * heads * rows * dim * 4 + graph_overhead() + (1 << 16)
    memory = layers * each + q_numbers.nbytes + 2 * tokens * rows + (1 << 20)
    context = init(InitParams(memory, None, False))
    if not context:
        raise MemoryError(f"{memory} bytes")
    contexts.append(context)

    q = new_tensor(context, F32, dim, rows, heads, batch)
    fill(q, converted(q_numbers, F32))
    mask = None
    if causal or unified:
        hidden = np.triu(np.ones((rows, tokens), dtype=bool), 1)
        if unified:
            owner = np.arange(tokens - case["prefix"]) // (context_tokens - case["prefix"])
            hidden[:, : case["prefix"]] = False
            hidden[:, case["prefix"] :] = owner[None, :] != np.arange(rows)[:, None]
        mask = new_tensor(context, F16, tokens, rows, 1, 1)
        fill(mask, np.where(hidden, -np.inf, 0).astype(np.float16).view(np.uint8).reshape(-1))
    graphs, outputs = [], []
    for _ in range(layers):
        kv = []
        for x in keys_and_values:
            if head_major:
                tensor = new_tensor(context, dtype, dim, tokens, kv_heads, batch)
                view = tensor
            else:  # as llama.cpp stores them
                tensor = new_tensor(context, dtype, dim, kv_heads, tokens, batch)
                view = permute(context, tensor, 0, 2, 1, 3)
            fill(tensor, x)
            kv.append(view)
        result = attention(context, q, kv[0], kv[1], mask, dim**-0.5, 0.0, 0.0)
        precision(result, PRECISION_F32)
        graph = new_graph(context)
        expand(graph, result)
        graphs.append(graph)
        outputs.append(result)

    def call(turn):
        if compute(backend, graphs[turn % len(graphs)]) != 0:
            raise RuntimeError("ggml_backend_graph_compute failed")

    call(0)
    # (batch, rows, heads, dim)
    size = batch * rows * heads * dim
    output = np.ctypeslib.as_array(ctypes.cast(data(outputs[0]), POINTER(c_float)), (size,))
    return clocked(call), output[-heads * dim :].tolist()


def clear():
    while contexts:
        free(contexts.pop())


serve(f"ggml of llama-cpp-python {version('llama-cpp-python')}", THREADS, prepare, clear)
