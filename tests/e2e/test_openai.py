"""OpenAI's API against the real server, called by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import anthropic
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
def claude(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client, which adds `/v1` itself."""
    base_url = (server.openai_url or "").removesuffix("/v1")
    with anthropic.Anthropic(base_url=base_url, api_key="none", max_retries=0) as client:
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


def test_an_answer_says_why_it_took_as_long_as_it_did(client: openai.OpenAI, grpc: Client) -> None:
    prompt = "One two three four five six seven eight nine ten. " * 4 + str(time.monotonic())
    options: Any = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "extra_body": {"return_timing": True}}
    first, again = client.completions.create(**options), client.completions.create(**options)
    for answer, is_cached in ((first, False), (again, True)):
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached = answer.usage.prompt_tokens_details.cached_tokens or 0
        assert (cached > 16) == is_cached
        timing: Any = (answer.model_extra or {})["fastserve"]
        assert timing["cached_tokens"] == cached
        assert 0 <= timing["queued_seconds"] <= timing["first_token_seconds"] <= timing["total_seconds"] < 60
        assert (timing["preemptions"], timing["recomputed_tokens"], timing["swapped_tokens"]) == (0, 0, 0)
    chunks = list(client.completions.create(**options, stream=True))
    assert chunks[-1].choices == []
    streamed: Any = (chunks[-1].model_extra or {})["fastserve"]
    assert streamed["cached_tokens"] > 16
    assert chunks[-1].usage is None
    over_grpc = grpc.generate(prompt, max_tokens=4, return_timing=True).timing
    assert over_grpc is not None
    assert over_grpc.cached_tokens == streamed["cached_tokens"]
    assert grpc.generate(prompt, max_tokens=1).timing is None


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


def test_a_response_whole_and_streamed_is_that_of_grpc(client: openai.OpenAI, grpc: Client) -> None:
    expected = grpc.generate(messages=MESSAGES, max_tokens=12, temperature=0.0)
    options: Any = {
        "model": MODEL,
        "input": MESSAGES,
        "max_output_tokens": 12,
        "temperature": 0.0,
        "store": False,
    }
    whole = client.responses.create(**options)
    assert whole.output_text == expected.text
    assert whole.usage is not None
    assert whole.usage.output_tokens == expected.num_output_tokens
    with client.responses.stream(**options) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final: Any = events[-1]  # `get_final_response` takes no response that has reached its limit
    assert final.type == f"response.{whole.status}"
    assert text == final.response.output_text == expected.text
    asynchronous = asyncio.run(_responded(str(client.base_url), options))
    assert asynchronous == expected.text


async def _responded(base_url: str, options: dict[str, Any]) -> str:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none") as client:
        response = await client.responses.create(**options)
        return str(response.output_text)


def test_a_response_in_a_pydantic_form_and_one_that_calls(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "temperature": 0.0, "max_output_tokens": 120}
    parsed = client.responses.parse(**options, input=MESSAGES, text_format=Person)
    assert isinstance(parsed.output_parsed, Person)
    tool: Any = {"type": "function", "strict": True} | WEATHER["function"]
    forced: Any = options | {"input": QUESTION, "tools": [tool], "tool_choice": "required"}
    forced["parallel_tool_calls"] = False
    whole = client.responses.create(**forced)
    [call] = [item for item in whole.output if item.type == "function_call"]
    assert set(json.loads(call.arguments)) == {"city", "unit"}
    with client.responses.stream(**forced) as stream:
        streamed = stream.get_final_response()
    assert [item.arguments for item in streamed.output if item.type == "function_call"] == [call.arguments]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 20 C"}
    history: Any = [*QUESTION, call.model_dump(), result]
    answer = client.responses.create(**options, input=history, tools=[tool], tool_choice="none")
    assert answer.output_text


def test_a_message_whole_and_streamed_is_that_of_grpc(claude: anthropic.Anthropic, grpc: Client) -> None:
    expected = grpc.generate(messages=MESSAGES, max_tokens=12, temperature=0.0)
    options: Any = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": 12,
        "extra_body": {"temperature": 0.0},
    }
    whole = claude.messages.create(**options)
    [block] = whole.content
    assert block.type == "text"
    assert block.text == expected.text
    num_cached = whole.usage.cache_read_input_tokens or 0
    assert whole.usage.input_tokens + num_cached == expected.num_input_tokens
    assert (
        claude.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens == expected.num_input_tokens
    )
    with claude.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == expected.text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_a_message_that_calls_and_one_that_is_stopped(claude: anthropic.Anthropic) -> None:
    tool: Any = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
    options: Any = {"model": MODEL, "max_tokens": 120, "extra_body": {"temperature": 0.0}, "tools": [tool]}
    whole = claude.messages.create(
        **options, messages=QUESTION, tool_choice={"type": "tool", "name": "get_weather"}
    )
    [call] = [block for block in whole.content if block.type == "tool_use"]
    assert whole.stop_reason == "tool_use"
    assert set(call.input) == {"city", "unit"}
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 20 C"}
    history: Any = [
        *QUESTION,
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [result]},
    ]
    assert claude.messages.create(**options, messages=history, tool_choice={"type": "none"}).content
    form: Any = {"format": {"type": "json_schema", "schema": {"enum": ["1 2 3 4 5"]}}}
    stopped = claude.messages.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=60,
        stop_sequences=["4", "3"],
        extra_body={"output_config": form},
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "3")
    assert [block.text for block in stopped.content if block.type == "text"] == ['"1 2 ']


def test_what_is_wrong_is_named_in_anthropics_shape(claude: anthropic.Anthropic) -> None:
    options: Any = {"model": MODEL, "messages": MESSAGES}
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(**options, max_tokens=0)
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**options | {"model": "another"}, max_tokens=1)
