"""Uses the server as programs do that were written for OpenAI's service: with its own Python library.

python openai_client.py PROGRAM
"""

import sys

import openai
from server import server


def expect(error, call, code, words):
    """The call must fail with this error."""
    try:
        call()
    except error as raised:
        assert raised.status_code == code, raised
        assert words in str(raised), raised
    else:
        raise AssertionError(f"no {error.__name__}")


def check(client):
    [model] = [model.id for model in client.models.list()]
    assert client.models.retrieve(model).id == model
    messages = [{"role": "user", "content": "What is the capital of France? One word."}]
    usual = {"model": model, "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    create = client.chat.completions.create

    whole = create(**usual)
    text = whole.choices[0].message.content
    assert "Paris" in text, text
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    again = create(**usual)
    assert again.choices[0].message.content == text
    assert again.usage.prompt_tokens_details.cached_tokens > 20, again.usage

    chunks = list(create(**usual, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text and len([piece for piece in pieces if piece]) > 1, pieces
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens

    several = create(**usual | {"temperature": 1.0, "n": 4, "seed": 7})
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) > 1, texts
    one = create(**usual | {"temperature": 1.0, "seed": 9})
    assert one.choices[0].message.content == texts[2]

    stopped = create(**usual, stop=["aris"])
    assert stopped.choices[0].message.content == text.split("aris")[0]
    assert stopped.choices[0].finish_reason == "stop"
    assert create(**usual | {"max_completion_tokens": 1}).choices[0].finish_reason == "length"

    [token, *_] = create(**usual, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert text.startswith(token.token) and token.top_logprobs[0].token == token.token

    with client.chat.completions.stream(**usual) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == text

    text = client.completions.create(model=model, prompt=["1, 2, 3,", "a, b, c,"], max_tokens=4, temperature=0, logprobs=1)
    assert [choice.index for choice in text.choices] == [0, 1] and "4" in text.choices[0].text, text
    assert len(text.choices[0].logprobs.tokens) == 4

    expect(openai.NotFoundError, lambda: create(**usual | {"model": "gpt-5"}), 404, "gpt-5")
    expect(openai.BadRequestError, lambda: create(**usual, tools=[{"type": "function"}]), 400, "`tools` is not supported")
    expect(openai.BadRequestError, lambda: create(**usual | {"messages": []}), 400, "empty")
    long = [{"role": "user", "content": "word " * 20000}]
    expect(openai.BadRequestError, lambda: create(**usual | {"messages": long}), 400, "context")
    wrong = openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0)
    expect(openai.AuthenticationError, lambda: wrong.models.list(), 401, "key")

    # Streams that are left in the middle.
    for _ in range(8):
        stream = create(**usual | {"max_completion_tokens": 1000}, stream=True)
        for _ in zip(range(3), stream):
            pass
        stream.close()
    assert create(**usual).choices[0].message.content == whole.choices[0].message.content


def main():
    with server(sys.argv[1], "--weights", "exact", "--api-key", "secret") as (_, address):
        check(openai.OpenAI(base_url=address + "/v1", api_key="secret", max_retries=0))
    print("the OpenAI client gets what it expects")


main()
