"""Many clients at once: some go away in the middle, ask nonsense, ask too much, or read slowly.

python load.py PROGRAM [--seconds 600] [--clients 64] [--slow]

Each complete answer is compared with the answer to the same request alone. It may differ where two tokens are almost
equally likely, since products of other shapes round differently. At the end no block may be in use.
"""

import argparse
import asyncio
import json
import random
import re
import time

from server import server

# A difference of log probabilities below this is a near tie.
NEAR = 1e-3
SYSTEMS = ["", "Be brief.", "You answer questions about the sea. " * 12, "You are a patient teacher. " * 30]
TOPICS = ["the moon", "bread", "a river", "glass", "the number seven", "rain", "trains", "salt", "paper", "sleep"]


def requests():
    """The requests whose answers are compared: mixed lengths, common system prompts."""
    random.seed(1)
    for number in range(40):
        topic = random.choice(TOPICS)
        question = f"{number}: what do you know about {topic}? " + f"I like {topic}. " * random.choice([0, 0, 4, 20, 40])
        messages = [{"role": "user", "content": question}]
        if system := random.choice(SYSTEMS):
            messages.insert(0, {"role": "system", "content": system})
        yield {
            "messages": messages,
            "max_tokens": random.choice([8, 32, 64, 128]),
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 2,
        }


class Client:
    """HTTP as far as it is needed, with control over every byte that is read."""

    def __init__(self, address):
        self.host, self.port = re.fullmatch(r"http://(.+):(\d+)", address).groups()

    async def post(self, body, path="/v1/chat/completions", cut_after=None, bytes_per_second=None):
        """The status and the body. With `cut_after`, the connection is closed after so many bytes of it."""
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1024 if bytes_per_second else 2**16)
        try:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split()[1])
            if bytes_per_second:
                for _ in range(random.randint(2, 8)):
                    if not await reader.read(bytes_per_second):
                        break
                    await asyncio.sleep(1)
                return status, None
            if cut_after is not None:
                await reader.read(cut_after)
                return status, None
            return status, chunked(await reader.read()) if b"chunked" in head.lower() else await reader.read()
        finally:
            writer.close()

    async def get(self, path):
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        text = (await reader.read()).decode()
        writer.close()
        return text

    async def metric(self, name):
        found = re.findall(rf"^{re.escape(name)} (\S+)$", await self.get("/metrics"), re.MULTILINE)
        return float(found[0]) if found else 0.0


def chunked(data):
    """The content of a chunked body."""
    out = b""
    while data:
        size, data = data.split(b"\r\n", 1)
        size = int(size, 16)
        out, data = out + data[:size], data[size + 2 :]
    return out


def tokens(body, stream):
    """Each token with its alternatives; `None` if the answer is not complete."""
    if not stream:
        return json.loads(body)["choices"][0]["logprobs"]["content"]
    events = [event[6:] for event in body.decode().split("\n\n") if event.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return None
    choices = [choice for event in events[:-1] for choice in json.loads(event).get("choices", [])]
    return [token for choice in choices for token in (choice["logprobs"] or {"content": []})["content"]]


def differs(expected, got):
    """`None` if both are equal; else whether they part at a near tie."""
    for a, b in zip(expected, got):
        if a["token"] != b["token"]:
            first, second = (top["logprob"] for top in a["top_logprobs"])
            return abs(first - second) < NEAR
    return None if len(expected) == len(got) else False


def memory(process):
    with open(f"/proc/{process.pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) / 1024


async def one(client, expected, slow, counts):
    kind, stream = random.random(), random.random() < 0.7
    number = random.randrange(len(expected))
    body = expected[number][0] | {"stream": stream}
    if slow:
        await client.post(body | {"stream": True, "max_tokens": 400}, bytes_per_second=1)
        counts["slow"] += 1
    elif kind < 0.2:
        await client.post(body | {"stream": True, "max_tokens": 400}, cut_after=random.randint(1, 4000))
        counts["cut off"] += 1
    elif kind < 0.25:
        wrong = random.choice([b"{", b"", b"[]", {"messages": 5}, body | {"tools": [1]}, body | {"n": -1}])
        status, _ = await client.post(wrong)
        assert status == 400, status
        counts["malformed"] += 1
    elif kind < 0.30:
        status, _ = await client.post(body | {"max_tokens": 100_000})
        assert status == 400, status
        counts["too long"] += 1
    else:
        status, answer = await client.post(body)
        if status == 429:
            counts["refused"] += 1
            await asyncio.sleep(1)
            return
        assert status == 200, (status, answer)
        got = tokens(answer, stream)
        assert got is not None, answer[-300:]
        near = differs(expected[number][1], got)
        counts["complete"] += 1
        counts["other, at a near tie"] += near is True
        counts["other"] += near is False


async def run(process, address, args):
    client = Client(address)
    expected = []
    for request in requests():
        status, answer = await client.post(request)
        assert status == 200, answer
        expected.append((request, tokens(answer, False)))
    names = ["complete", "other, at a near tie", "other", "cut off", "malformed", "too long", "refused", "slow"]
    counts = dict.fromkeys(names, 0)
    end = time.monotonic() + args.seconds
    memories = []

    async def many(slow):
        while time.monotonic() < end:
            await one(client, expected, slow, counts)

    async def burst():
        await asyncio.sleep(args.seconds / 3)
        body = expected[0][0]
        answers = await asyncio.gather(*(client.post(body) for _ in range(2 * args.clients)))
        counts["refused"] += sum(status == 429 for status, _ in answers)
        assert all(status in (200, 429) for status, _ in answers)

    async def watch():
        while time.monotonic() < end:
            memories.append(memory(process))
            await asyncio.sleep(args.seconds / 20)

    slow = args.clients if args.slow else 0
    clients = [many(number < slow) for number in range(args.clients + slow)]
    await asyncio.gather(*clients, burst(), watch())
    for _ in range(100):
        if await client.metric("vllm:kv_cache_usage_perc") == 0:
            break
        await asyncio.sleep(0.1)
    preempted = await client.metric("kv_cache_preemptions")
    steps = await client.metric("serve_step_seconds_count")
    late = steps - await client.metric('serve_step_seconds_bucket{le="0.25"}')
    usage, running = [await client.metric(name) for name in ("vllm:kv_cache_usage_perc", "vllm:num_requests_running")]
    print(json.dumps(counts))
    print(f"{steps:.0f} steps, {late:.0f} of them longer than 250 ms, {preempted:.0f} preemptions")
    print(f"memory, MiB: {' '.join(f'{memory:.0f}' for memory in memories)}")
    assert (usage, running) == (0, 0), f"{usage} of the pool is in use, {running} run"
    assert counts["other"] == 0, "answers differ where no two tokens are almost equally likely"
    assert preempted > 0 and counts["refused"] > 0 and counts["complete"] > 0, "the load is too small"
    # The first quarter has the first use of every buffer.
    assert max(memories[-3:]) < 1.1 * max(memories[: len(memories) // 4 + 1]) + 32, "memory grows"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slow", action="store_true", help="as many clients more, which read one byte a second")
    args = parser.parse_args()
    # A pool for little more than the longest, and a queue that a burst fills.
    limits = ["--blocks", "64", "--max-num-seqs", "16", "--max-waiting", "96", "--weights", "exact"]
    with server(args.program, *limits) as (process, address):
        asyncio.run(run(process, address, args))


main()
