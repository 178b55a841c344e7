"""Checks batch_generate's JSON output: sequences were preempted, and samples equal separate runs with their seeds."""

import json
import sys
from pathlib import Path

out = Path(sys.argv[1])


def load(name):
    return json.loads((out / f"{name}.json").read_text())


whole, tiny = load("16"), load("tiny")
assert len(whole["sequences"]) == 8
preemptions = sum(s["preemptions"] for s in tiny["sequences"])
assert preemptions >= 2, f"only {preemptions} preemptions"
resumed = tiny["prefix"]["resumed_tokens"]
assert resumed > 0, "nothing was found again after a preemption"
assert [s["tokens"] for s in whole["sequences"]] == [s["tokens"] for s in tiny["sequences"]]

samples = load("samples")
for seed in range(4):
    for prompt, alone in enumerate(load(f"seed{seed}")["sequences"]):
        together = samples["sequences"][4 * prompt + seed]
        assert together["tokens"] == alone["tokens"], f"prompt {prompt}, seed {seed}"
        # The first sample computes the part of its prompt that is not cached; the others compute nothing of the prompt.
        cached, prompt_tokens = together["cached_tokens"], together["prompt_tokens"]
        assert cached == prompt_tokens if seed else cached < prompt_tokens

# 32 prompts with one long common prefix: the prefix is computed once, and the rest of each prompt.
shared = load("shared")
assert len(shared["sequences"]) == 32
begin, own = shared["sequences"][0], shared["sequences"][1:]
assert begin["cached_tokens"] == 0 and begin["prompt_tokens"] > 500
common = min(s["cached_tokens"] for s in own)
assert common > 480, f"only {common} tokens of the common beginning are found"
prefix = shared["prefix"]
expected = begin["prompt_tokens"] + sum(s["prompt_tokens"] - s["cached_tokens"] for s in own)
assert prefix["computed_prompt_tokens"] == expected, (prefix, expected)
factor = prefix["prompt_tokens"] / prefix["computed_prompt_tokens"]
assert factor > 15, factor
block_size = samples["pool"]["block_size"]
prompts = [s["prompt_tokens"] for s in samples["sequences"][::4]]
# The full blocks of each prompt once; for each answer, its last block and the blocks that 24 more tokens can need.
most = sum(p // block_size + 4 * (1 + -(-24 // block_size)) for p in prompts)
assert samples["pool"]["peak_blocks"] <= most, (samples["pool"], most)
print(f"{preemptions} preemptions, 32 of 32 samples equal, {samples['pool']['peak_blocks']} <= {most} blocks, "
      f"{resumed} tokens found again, {factor:.1f} times less prefill behind a common beginning")
