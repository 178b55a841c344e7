"""PyTorch's scaled dot product attention over a contiguous cache `(batch, kv_heads, tokens, head_dim)`, and two ways to
append to such a cache. Sequences that begin alike are computed in two ways: each has a copy of what all share; or the
queries of all attend to it as rows of one sequence, and the result is merged with that of what is their own (cascade).
"""

import os

import torch
import torch.nn.functional as F
from protocol import clocked, layers_of_copies, numbers, serve

THREADS = int(os.environ["OMP_NUM_THREADS"])
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# All ways of decoding from copies read the same caches.
caches = {}


def sequence(case, kind):
    """Returns the keys or values of one sequence, `(1, kv_heads, tokens, head_dim)`."""
    tokens, kv_heads, dim = case["context"], case["kv_heads"], case["head_dim"]
    x = torch.from_numpy(numbers(kind, tokens * kv_heads * dim)).view(tokens, kv_heads, dim)
    return x.transpose(0, 1).to(DTYPES[case["dtype"]]).unsqueeze(0)


def layers(case):
    key = tuple(sorted(case.items()))
    if key not in caches:
        caches.clear()
        count = layers_of_copies(case, DTYPES[case["dtype"]].itemsize)
        k, v = (sequence(case, kind).repeat(case["batch"], 1, 1, 1) for kind in "kv")
        caches[key] = [(k, v)] + [(k.clone(), v.clone()) for _ in range(count - 1)]
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

    call = group_as_rows if variant.endswith("group as rows") else plain
    return clocked(call), call(0)[-1].float().flatten().tolist()


def cascade(case):
    batch, kv_heads, dim, prefix = case["batch"], case["kv_heads"], case["head_dim"], case["prefix"]
    whole = [sequence(case, kind) for kind in "kv"]
    shared = [x[:, :, :prefix].contiguous() for x in whole]
    own = [x[:, :, prefix:].repeat(batch, 1, 1, 1) for x in whole]
    cache = [tuple(x.clone() for x in shared + own) for _ in range(case["layers"])]
    q = queries(case, 1).view(batch, kv_heads, -1, dim)
    # The only attention of PyTorch for CPUs that returns the logarithms of the sums, which the merge needs.
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def call(turn):
        shared_k, shared_v, own_k, own_v = cache[turn % len(cache)]
        rows = q.transpose(0, 1).reshape(1, kv_heads, -1, dim)
        y, sums = attend(rows, shared_k, shared_v)
        y = y.view(kv_heads, batch, -1, dim).transpose(0, 1)
        sums = sums.view(kv_heads, batch, -1).transpose(0, 1)
        own_y, own_sums = attend(q, own_k, own_v)
        share = torch.sigmoid(sums - own_sums.view(sums.shape)).unsqueeze(-1)
        return torch.lerp(own_y.float(), y.float(), share).to(q.dtype).view(batch, -1, 1, dim)

    return clocked(call), call(0)[-1].float().flatten().tolist()


def shared(case, variant):
    return cascade(case) if variant == "cascade" else decode(case, variant)


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
        prepare_kind = {"decode": decode, "shared": shared, "prefill": prefill, "append": append}[case["kind"]]
        run, output = prepare_kind(case, variant)

    def inferring(times):
        with torch.inference_mode():
            return run(times)

    return inferring, output


torch.set_num_threads(THREADS)
serve(f"PyTorch {torch.__version__}", torch.get_num_threads(), prepare, caches.clear)
