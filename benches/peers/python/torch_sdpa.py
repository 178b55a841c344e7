"""PyTorch's scaled dot product attention over a contiguous cache `(batch, kv_heads, tokens, head_dim)`, and two ways to
append to such a cache."""

import os

import torch
import torch.nn.functional as F
from protocol import clocked, numbers, serve

THREADS = int(os.environ["OMP_NUM_THREADS"])
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# Both ways of decoding read the same caches.
caches = {}


def layers(case):
    key = tuple(sorted(case.items()))
    if key not in caches:
        caches.clear()
        tokens, kv_heads, dim = case["context"], case["kv_heads"], case["head_dim"]

        def one(kind):
            x = torch.from_numpy(numbers(kind, tokens * kv_heads * dim)).view(tokens, kv_heads, dim)
            x = x.transpose(0, 1).to(DTYPES[case["dtype"]])
            return x.unsqueeze(0).repeat(case["batch"], 1, 1, 1)

        k, v = one("k"), one("v")
        caches[key] = [(k, v)] + [(k.clone(), v.clone()) for _ in range(case["layers"] - 1)]
    return caches[key]


def queries(case, tokens):
    heads, dim = case["heads"], case["head_dim"]
    q = torch.from_numpy(numbers("q", tokens * heads * dim)).view(tokens, heads, dim).transpose(0, 1)
    return q.to(DTYPES[case["dtype"]]).unsqueeze(0).repeat(case["batch"], 1, 1, 1).contiguous()


def decode(case, variant):
    cache = layers(case)
    q = queries(case, 1)
    folded = q.view(case["batch"], case["kv_heads"], -1, case["head_dim"])

    def plain(turn):
        k, v = cache[turn % len(cache)]
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def group_as_rows(turn):
        k, v = cache[turn % len(cache)]
        return F.scaled_dot_product_attention(folded, k, v)

    call = {"plain": plain, "group as rows": group_as_rows}[variant]
    return clocked(call), call(0)[-1].float().flatten().tolist()


def prefill(case, variant):
    k, v = layers(case)[0]
    q = queries(case, case["context"])

    def call(_):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return clocked(call), call(0)[-1, :, -1].float().flatten().tolist()


def append(case, variant):
    (k, v) = layers(case)[0]
    token = torch.zeros_like(k[:, :, :1])
    if variant == "cat":

        def call(_):
            return torch.cat((k, token), 2), torch.cat((v, token), 2)

    else:
        room = [torch.cat((x, torch.zeros_like(x[:, :, :512])), 2) for x in (k, v)]
        first = case["context"]

        def call(turn):
            at = first + turn % 512
            room[0][:, :, at : at + 1] = token
            room[1][:, :, at : at + 1] = token

    call(0)
    return clocked(call), []


def prepare(case, variant):
    with torch.inference_mode():
        run, output = {"decode": decode, "prefill": prefill, "append": append}[case["kind"]](case, variant)

    def inferring(times):
        with torch.inference_mode():
            return run(times)

    return inferring, output


torch.set_num_threads(THREADS)
serve(f"PyTorch {torch.__version__}", torch.get_num_threads(), prepare, caches.clear)
