"""llama.cpp end to end: sequences of a given length decode one token each per step, all in one batch.

Flash attention is on, and keys and values are f16. Each sequence has its own buffer: with one buffer for all (unified),
every sequence's attention passes over the tokens of the others. What all sequences begin with is computed once; in a
unified buffer it is also stored once."""

import ctypes
import os
import time

import llama_cpp as llama
import numpy as np
from protocol import serve

THREADS = int(os.environ["OMP_NUM_THREADS"])
# Tokens of a prompt that are computed together, the same number as in our contender.
PIECE = 512


@llama.llama_log_callback
def silent(_level, _text, _data):
    pass


llama.llama_log_set(silent, ctypes.c_void_p(0))
llama.llama_backend_init()
parameters = llama.llama_model_default_params()
# With the matrices that llama.cpp makes for AMX, 4-bit matrices as wide as the default model's crash the process.
parameters.use_extra_bufts = b"AMX_INT8 = 1" not in llama.llama_print_system_info()
model = llama.llama_model_load_from_file(os.environ["PEERS_MODEL"].encode(), parameters)
vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
contexts = []


def rounded(tokens):
    """A buffer's tokens are a multiple of 256."""
    return -(-tokens // 256) * 256


def prepare(case, variant):
    batch, context = case["batch"], case["context"]
    unified = variant.startswith("unified")
    # Without a shared prefix the sequences are copies of one.
    prefix = case["prefix"] or context
    parameters = llama.llama_context_default_params()
    if unified:
        parameters.n_ctx = rounded(prefix + batch * (context - prefix + case["room"]))
    else:
        parameters.n_ctx = batch * rounded(context + case["room"])
    parameters.n_seq_max = batch
    parameters.n_batch = parameters.n_ubatch = PIECE
    parameters.n_threads = parameters.n_threads_batch = THREADS
    parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    parameters.kv_unified = unified
    llama_context = llama.llama_init_from_model(model, parameters)
    if not llama_context:
        raise MemoryError(f"cannot create a context for {batch} sequences of {context} tokens")
    contexts.append(llama_context)
    memory = llama.llama_get_memory(llama_context)
    rows = llama.llama_batch_init(max(PIECE, batch), 0, 1)

    def compute(tokens, positions, sequences, wanted):
        rows.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences)):
            rows.token[i] = token
            rows.pos[i] = position
            rows.n_seq_id[i] = 1
            rows.seq_id[i][0] = sequence
            rows.logits[i] = wanted(i)
        if llama.llama_decode(llama_context, rows) != 0:
            raise RuntimeError(f"llama_decode failed at {batch} x {context}")

    def likeliest(n):
        logits = np.ctypeslib.as_array(llama.llama_get_logits(llama_context), (n, vocabulary))
        return logits.argmax(axis=1).tolist()

    def prefill(sequence, prompt, position):
        for first in range(0, len(prompt), PIECE):
            piece = prompt[first : first + PIECE]
            places = range(position + first, position + first + len(piece))
            compute(piece, places, [sequence] * len(piece), lambda i: i + 1 == len(piece))
            token = likeliest(1)[0]
        return token

    # What all share is computed once; the others get its keys and values.
    own = context - prefix
    prompt = [((i * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 33) % vocabulary for i in range(prefix + batch * own)]
    started = time.perf_counter_ns()
    next_tokens = [prefill(0, prompt[:prefix], 0)] * batch
    time_of_prefix = time.perf_counter_ns() - started
    for sequence in range(1, batch):
        llama.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
    if own:
        tails = [prompt[prefix + i * own :][:own] for i in range(batch)]
        next_tokens = [prefill(i, tail, prefix) for i, tail in enumerate(tails)]

    def run(times):
        tokens = next_tokens
        total = 0
        for step in range(times):
            started = time.perf_counter_ns()
            compute(tokens, [context + step] * batch, range(batch), lambda _: True)
            tokens = likeliest(batch)
            total += time.perf_counter_ns() - started
        for sequence in range(batch):
            llama.llama_memory_seq_rm(memory, sequence, context, -1)
        return total

    return run, [time_of_prefix]


def clear():
    while contexts:
        llama.llama_free(contexts.pop())


serve(f"llama.cpp of llama-cpp-python {llama.__version__}", THREADS, prepare, clear)
