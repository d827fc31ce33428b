"""`fastserve_client` against the real server, by both protocols."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Any, Literal

import pytest

from fastserve_client import AsyncClient, Client, FastServeError, Generation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import RunningServer

    Protocol = Literal["grpc", "http"]

IDLE_SECONDS = 10.0
"""A request that was left must be gone from the engine by then."""
PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
ENDLESS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 2000, "ignore_eos": True}


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> Protocol:
    return request.param


@pytest.fixture
def url(server: RunningServer, protocol: Protocol) -> str:
    return {"grpc": server.grpc_url, "http": server.http_url}[protocol]


@pytest.fixture
def client(url: str, protocol: Protocol) -> Iterator[Client]:
    with Client(url, protocol) as client:
        yield client


def complete(client: Client, streaming: bool, prompt: str, **options: Any) -> Generation:
    """The answer, whole or joined from a stream."""
    return client.stream(prompt, **options).read() if streaming else client.generate(prompt, **options)


def test_ready(client: Client) -> None:
    assert client.is_ready()


def test_the_text_of_both_ways_is_the_same(client: Client) -> None:
    whole = client.generate(PROMPT, **GREEDY, return_token_ids=True)
    chunks = list(client.stream(PROMPT, **GREEDY, return_token_ids=True))
    assert len(chunks) > 1
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [i for chunk in chunks for i in chunk.token_ids or []] == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason == "length"
    assert sum(chunk.num_output_tokens for chunk in chunks) == whole.num_output_tokens == 24
    assert "Paris" in whole.text


def test_both_protocols_and_asyncio_give_the_same(server: RunningServer, client: Client) -> None:
    async def ask(url: str, protocol: Protocol) -> list[Generation]:
        async with AsyncClient(url, protocol) as client:
            whole, joined = await asyncio.gather(
                client.generate(PROMPT, **GREEDY, logprobs=2),
                client.stream(PROMPT, **GREEDY, logprobs=2).read(),
            )
            return [whole, joined]

    answers = [client.generate(PROMPT, **GREEDY, logprobs=2)]
    answers += asyncio.run(ask(server.grpc_url, "grpc")) + asyncio.run(ask(server.http_url, "http"))
    assert len({answer.text for answer in answers}) == 1
    assert all(len(answer.logprobs or []) == 24 for answer in answers)


def test_several_sequences(client: Client) -> None:
    options: dict[str, Any] = {"n": 3, "seed": 1, "max_tokens": 8, "return_token_ids": True}
    whole = client.generate(PROMPT, **options, ignore_eos=True)
    joined = client.stream(PROMPT, **options, ignore_eos=True).read()
    assert [completion.num_output_tokens for completion in whole.completions] == [8, 8, 8]
    assert [completion.token_ids for completion in joined.completions] == [
        completion.token_ids for completion in whole.completions
    ]


def test_messages_and_token_ids_as_prompts(client: Client) -> None:
    chat = client.generate(messages=[{"role": "user", "content": "Say hello."}], **GREEDY)
    assert chat.num_input_tokens > 10
    tokens = client.generate(prompt_token_ids=[504, 3575, 282], **GREEDY)
    assert tokens.num_input_tokens == 3


def test_logprobs_of_prompt_and_answer(client: Client) -> None:
    answer = client.generate(
        PROMPT,
        temperature=0.0,
        max_tokens=4,
        logprobs=2,
        prompt_logprobs=1,
        return_token_ids=True,
        return_cumulative_logprob=True,
    )
    assert answer.logprobs is not None
    assert answer.token_ids is not None
    assert answer.prompt_logprobs is not None
    chosen = [
        position[token_id] for token_id, position in zip(answer.token_ids, answer.logprobs, strict=True)
    ]
    assert [logprob.rank for logprob in chosen] == [1] * len(chosen)
    assert answer.cumulative_logprob == pytest.approx(sum(logprob.logprob for logprob in chosen), rel=1e-4)
    assert len(answer.prompt_logprobs) == answer.num_input_tokens
    assert answer.prompt_logprobs[0] == {}


def test_the_prompt_before_the_text(client: Client) -> None:
    assert client.generate(PROMPT, **GREEDY, exclude_input_in_output=False).text.startswith(PROMPT)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"temperature": -1.0}, "temperature"), ({"temprature": 1.0}, "temprature"), ({"n": 0}, "n")],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_wrong_is_named(client: Client, streaming: bool, options: dict[str, Any], named: str) -> None:
    with pytest.raises(FastServeError) as caught:
        complete(client, streaming, PROMPT, **options)
    assert caught.value.code == "INVALID_ARG"
    assert f"`{named}`" in caught.value.message


def test_a_prompt_is_needed(client: Client) -> None:
    with pytest.raises(FastServeError, match="exactly one of"):
        client.generate()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_deadline(server: RunningServer, client: Client, streaming: bool) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        complete(client, streaming, PROMPT, **ENDLESS, timeout=0.5)
    assert time.monotonic() - started < 2.0
    server.wait_until_idle(IDLE_SECONDS)


def test_leaving_a_stream_frees_its_place(server: RunningServer, client: Client) -> None:
    with client.stream(PROMPT, **ENDLESS) as stream:
        assert next(stream).num_output_tokens >= 1
    server.wait_until_idle(IDLE_SECONDS)


def test_a_task_that_is_cancelled_frees_its_place(
    server: RunningServer, url: str, protocol: Protocol
) -> None:
    async def leave() -> None:
        async with AsyncClient(url, protocol) as client:
            waiting = asyncio.create_task(client.generate(PROMPT, **ENDLESS))
            async for _ in client.stream(PROMPT, **{**ENDLESS, "max_tokens": 4}):
                pass  # the other one runs beside it by now
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(leave())
    server.wait_until_idle(IDLE_SECONDS)


def test_cancel_by_id_from_outside(server: RunningServer, client: Client) -> None:
    request_id = uuid.uuid4().hex
    stream = client.stream(PROMPT, **ENDLESS, request_id=request_id)
    next(stream)
    client.cancel(request_id)
    with pytest.raises(FastServeError) as caught:
        stream.read()
    assert "cancelled" in caught.value.message
    server.wait_until_idle(IDLE_SECONDS)


def test_cancel_of_an_unknown_id_is_no_error(client: Client) -> None:
    client.cancel("no such request")


def test_many_streams_at_once_on_one_client(client: Client) -> None:
    alone = client.generate(PROMPT, **GREEDY).text
    streams = [client.stream(PROMPT, **GREEDY, priority=priority) for priority in range(-1, 11)]
    assert [stream.read().text for stream in streams] == [alone] * 12
