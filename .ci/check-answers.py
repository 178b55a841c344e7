"""Reads the generator's JSON: preemptions happened, and samples equal separate runs with their seeds."""

import json
import sys
from pathlib import Path

out = Path(sys.argv[1])


def load(name):
    return json.loads((out / f"{name}.json").read_text())


whole, tiny = load("16"), load("tiny")
assert len(whole["sequences"]) == 8
preemptions = sum(s["preemptions"] for s in tiny["sequences"])
assert preemptions >= 3, f"only {preemptions} preemptions"
assert [s["tokens"] for s in whole["sequences"]] == [s["tokens"] for s in tiny["sequences"]]

samples = load("samples")
for seed in range(4):
    for prompt, alone in enumerate(load(f"seed{seed}")["sequences"]):
        together = samples["sequences"][4 * prompt + seed]
        assert together["tokens"] == alone["tokens"], f"prompt {prompt}, seed {seed}"
        # The first sample computes what no other prompt begins with, the others find the whole prompt there.
        cached, prompt_tokens = together["cached_tokens"], together["prompt_tokens"]
        assert cached == prompt_tokens if seed else cached < prompt_tokens
block_size = samples["pool"]["block_size"]
prompts = [s["prompt_tokens"] for s in samples["sequences"][::4]]
# Each prompt's full blocks once; per answer its last block, and what 24 tokens can grow into.
most = sum(p // block_size + 4 * (1 + -(-24 // block_size)) for p in prompts)
assert samples["pool"]["peak_blocks"] <= most, (samples["pool"], most)
print(f"{preemptions} preemptions, 32 of 32 samples equal, {samples['pool']['peak_blocks']} <= {most} blocks")
