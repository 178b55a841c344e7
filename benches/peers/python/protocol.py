"""One JSON object a line, from the driver and back.

    {"do": "prepare", "variant": "plain", "case": {...}}  ->  {"id": 0, "output": [...]}
    {"do": "run", "id": 0, "times": 8}                    ->  {"ns": 123456}
    {"do": "clear"}                                       ->  {}

The first line comes unasked and says who answers: {"name": "PyTorch 2.13.0", "threads": 2}. What goes wrong is
{"error": "..."}, and the next line is served all the same.

A case has `kind` (decode, prefill, append, generate), `heads`, `kv_heads`, `head_dim`, `batch`, `context`, `dtype` (f32,
f16, bf16, int8) and `layers`: as many copies of keys and values as calls rotate over. Numbers come from `numbers`, so that every
contender computes the same and the driver can compare `output`, the last token's `(heads, head_dim)`.
"""

import gc
import json
import os
import sys
import time


def numbers(kind, count):
    """`count` numbers between -1 and 1, the same on every side; queries are wider, so that the softmax has peaks."""
    import numpy as np

    seed, width = {"q": (1, 2.0), "k": (2, 1.0), "v": (3, 1.0)}[kind]
    x = np.arange(count, dtype=np.uint32)
    x += np.uint32(seed * 1_000_003 % 2**32)
    x *= np.uint32(0x9E3779B1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x85EBCA77)
    x ^= x >> np.uint32(13)
    return ((x & np.uint32(0xFFFF)).astype(np.float32) / 32768.0 - 1.0) * np.float32(width)


def clocked(call):
    """Makes `run(times)`, in nanoseconds, of `call(turn)`, where `turn` counts on from run to run."""
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
    """Serves until the driver closes its end. `prepare(case, variant)` returns `run` and the output to compare."""
    # Libraries print what they like; the driver hears only answers.
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
                raise ValueError(f"no such request: {request['do']}")
        except Exception as error:  # the driver decides what a failure means
            answer({"error": f"{type(error).__name__}: {error}"})
