"""OpenAI's API against the real server, called by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from tests.e2e.conftest import RunningServer

from fastserve_client import Client

IDLE_SECONDS = 10.0
MODEL = "fastserve"
PROMPT = "The capital of France is"
MESSAGES: Any = [{"role": "user", "content": "Say hello."}]


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.openai_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def grpc(server: RunningServer) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


def test_greedy_text_is_that_of_grpc(client: openai.OpenAI, grpc: Client) -> None:
    expected = grpc.generate(PROMPT, max_tokens=12, temperature=0.0).text
    options: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0.0}
    assert client.completions.create(**options).choices[0].text == expected
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_whole_and_streamed_is_that_of_grpc(client: openai.OpenAI, grpc: Client) -> None:
    expected = grpc.generate(messages=MESSAGES, max_tokens=8, seed=3)
    options: Any = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 8, "seed": 3}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == expected.num_output_tokens
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(each.choices[0].delta.content or "" for each in chunks[:-1]) == expected.text
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert whole.usage.prompt_tokens == expected.num_input_tokens


def test_several_prompts_and_answers(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": [PROMPT, [504, 3575]], "n": 2, "seed": 1, "max_tokens": 4}
    whole = client.completions.create(**options)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {choice.index: choice.text for choice in whole.choices}


def test_logprobs_of_an_echo(client: openai.OpenAI, grpc: Client) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=2, temperature=0.0, echo=True, logprobs=1
    )
    [choice] = answer.choices
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert choice.text.startswith(PROMPT)
    expected = grpc.generate(PROMPT, max_tokens=2, temperature=0.0, prompt_logprobs=0).prompt_logprobs or []
    chosen = [next(iter(position.values())).logprob for position in expected[1:]]
    assert (choice.logprobs.token_logprobs or [])[1 : len(expected)] == pytest.approx(chosen)


def test_a_pydantic_form(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 80, "temperature": 0.0}
    answer = client.chat.completions.parse(**options, response_format=Person)
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_what_is_wrong_is_named(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": MESSAGES}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**options, temperature=-1.0)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**options, max_completion_tokens=0, stream=True)
    assert caught.value.param == "max_completion_tokens"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**options | {"model": "another"})
    with pytest.raises(openai.APIStatusError) as late:
        client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=2000, extra_body={"deadline_ms": 300, "ignore_eos": True}
        )
    assert late.value.status_code == 504


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_frees_the_engine(server: RunningServer, streaming: bool) -> None:
    """asyncio: the task is cancelled, and with it the connection closed."""

    async def leave() -> None:
        endless: Any = {"max_tokens": 2000, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
        async with openai.AsyncOpenAI(base_url=server.openai_url, api_key="none") as client:
            call = client.completions.create(model=MODEL, prompt=PROMPT, stream=streaming, **endless)
            if streaming:
                stream: Any = await call
                async for _ in stream:
                    break
                await stream.close()
                return
            task = asyncio.ensure_future(call)
            await asyncio.to_thread(
                server.wait_for_metrics, lambda found: found["fastserve_requests_running"] > 0, IDLE_SECONDS
            )
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(leave())
    server.wait_until_idle(IDLE_SECONDS)


def test_the_process_is_started_anew(server: RunningServer, client: openai.OpenAI) -> None:
    process = server.launcher.openai
    assert process is not None
    first = process.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + 30.0
    while process.pid == first:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.wait_listening(30.0)
    assert client.models.retrieve(MODEL).id == MODEL


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"city": {"type": "string", "maxLength": 12}},
        },
    },
}
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "get_weather"}}, "stop")],
)
def test_a_forced_call_streamed_is_the_whole_one(client: openai.OpenAI, choice: Any, reason: str) -> None:
    options: Any = {
        "model": MODEL,
        "messages": QUESTION,
        "tools": [WEATHER],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0.0,
        "max_completion_tokens": 120,
    }
    [whole] = client.chat.completions.create(**options).choices
    assert whole.finish_reason == reason
    [call] = whole.message.tool_calls or []
    assert call.type == "function"
    assert set(json.loads(call.function.arguments)) == {"city", "unit"}
    name = arguments = ""
    for chunk in client.chat.completions.create(**options, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            assert part.function is not None
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert (name, arguments) == (call.function.name, call.function.arguments) == ("get_weather", arguments)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 20 C"}
    history = [*QUESTION, whole.message.model_dump(exclude_none=True), result]
    follow_up: Any = {"model": MODEL, "tools": [WEATHER], "tool_choice": "none", "max_completion_tokens": 8}
    answer = client.chat.completions.create(messages=history, **follow_up)
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None
