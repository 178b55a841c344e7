"""The protocol between the driver and a peer: one JSON object per line in both directions.

    {"do": "prepare", "variant": "plain", "case": {...}}  ->  {"id": 0, "output": [...]}
    {"do": "run", "id": 0, "times": 8}                    ->  {"ns": 123456}
    {"do": "clear"}                                       ->  {}

The peer sends the first line without a request, to say its name: {"name": "PyTorch 2.13.0", "threads": 2}. The answer
to a request that fails is {"error": "..."}; the peer then goes on with the next line.

A case has `kind` (decode, shared, prefill, append, generate), `heads`, `kv_heads`, `head_dim`, `batch`, `context`,
`prefix` (how many tokens of the context all sequences share), `room` (tokens that each sequence may grow by), `dtype`
(f32, f16, bf16, int8) and `layers` (the number of copies of keys and values that calls rotate over). The numbers come
from `numbers`, so that every contender computes the same and the driver can compare `output`, the last token's
`(heads, head_dim)`.
"""

import gc
import json
import os
import sys
import time


def numbers(kind, count):
    """Returns `count` numbers between -1 and 1, the same as `numbers.rs`. Queries are twice as wide, so that the
    softmax has peaks."""
    import numpy as np

    seed, width = {"q": (1, 2.0), "k": (2, 1.0), "v": (3, 1.0)}[kind]
    x = np.arange(count, dtype=np.uint32)
    x += np.uint32(seed * 1_000_003 % 2**32)
    x *= np.uint32(0x9E3779B1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x85EBCA77)
    x ^= x >> np.uint32(13)
    return ((x & np.uint32(0xFFFF)).astype(np.float32) / 32768.0 - 1.0) * np.float32(width)


def layers_of_copies(case, bytes_each):
    """Returns the number of layers of a peer that gives every sequence its own copy of what all share. They read at
    least as many bytes as the case's layers."""
    tokens = case["batch"] * case["context"]
    unique = tokens - (case["batch"] - 1) * case["prefix"]
    layers = -(-case["layers"] * unique // tokens)
    size = layers * 2 * tokens * case["kv_heads"] * case["head_dim"] * bytes_each
    if size > 5 << 30:
        raise MemoryError(f"copies for each sequence take {size / (1 << 30):.1f} GiB")
    return layers


def clocked(call):
    """Returns a `run(times)` that calls `call(turn)` and returns nanoseconds; `turn` continues from run to run."""
    state = {"turn": 0}

    def run(times):
        first = state["turn"]
        state["turn"] = first + times
        started = time.perf_counter_ns()
        for turn in range(first, first + times):
            call(turn)
        return time.perf_counter_ns() - started

    return run


def serve(name, threads, prepare, clear=lambda: None):
    """Serves requests until the driver closes its end. `prepare(case, variant)` returns `run` and the output to
    compare."""
    # What libraries print goes to standard error; the driver reads only answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(what):
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    answer({"name": name, "threads": threads})
    prepared = []
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["do"] == "prepare":
                run, output = prepare(request["case"], request["variant"])
                prepared.append(run)
                answer({"id": len(prepared) - 1, "output": [float(x) for x in output]})
            elif request["do"] == "run":
                answer({"ns": prepared[request["id"]](request["times"])})
            elif request["do"] == "clear":
                prepared.clear()
                clear()
                gc.collect()
                answer({})
            else:
                raise ValueError(f"unknown request: {request['do']}")
        except Exception as error:  # the driver decides what to do about a failure
            answer({"error": f"{type(error).__name__}: {error}"})
