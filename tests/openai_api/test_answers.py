"""The shapes of answers, whole and streamed, and of errors."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.openai_api.conftest import MODEL, FakeClient, completion
from tests.openai_api.test_requests import CHAT, TEXT, chat, complete

from fastserve.openai_api.app import create_app
from fastserve_client import Chunk, FastServeError, Generation, Logprob, Timing


def events(answer: Any) -> list[Any]:
    """The JSON of the events; the last one is [DONE]."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    *data, end, empty = answer.text.split("\n\n")
    assert (end, empty) == ("data: [DONE]", "")
    return [json.loads(each.removeprefix("data: ")) for each in data]


def test_a_whole_chat(api: TestClient) -> None:
    answer = chat(api, logprobs=True, top_logprobs=1).json()
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hi", "refusal": None, "annotations": []}
    assert choice["finish_reason"] == "stop"
    first = {"token": "<1>", "logprob": -1.0, "bytes": [60, 49, 62]}
    assert choice["logprobs"]["content"][0] == first | {"top_logprobs": [first]}
    assert answer["usage"]["total_tokens"] == 5
    assert (answer["object"], answer["model"]) == ("chat.completion", MODEL)


def test_a_streamed_chat(api: TestClient, fake: FakeClient) -> None:
    fake.chunks = [
        Chunk([completion("H", None, (1,)), completion("", None)], 3, None),
        Chunk([completion("i", "stop", (2,)), completion("Yo", "length", (3,))], 3, None),
    ]
    found = events(chat(api, stream=True, stream_options={"include_usage": True}, n=2))
    deltas = [(c["index"], c["delta"], c["finish_reason"]) for each in found for c in each["choices"]]
    start = {"role": "assistant", "content": ""}
    assert deltas == [
        (0, start, None),
        (1, start, None),
        (0, {"content": "H"}, None),
        (0, {"content": "i"}, None),
        (0, {}, "stop"),
        (1, {"content": "Yo"}, None),
        (1, {}, "length"),
    ]
    assert found[-1]["choices"] == []
    counts = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert found[-1]["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}
    assert all(each["usage"] is None for each in found[:-1])
    assert len({each["id"] for each in found}) == 1
    assert fake.streams[0].is_closed


def test_streamed_completions_of_two_prompts(api: TestClient, fake: FakeClient) -> None:
    fake.chunks = [
        Chunk([completion(" a", None, (1,))], 3, None),
        Chunk([completion(" b", "stop", (2,))], 3, None),
    ]
    found = events(
        complete(api, prompt=["x", "y"], stream=True, echo=True, stream_options={"include_usage": True})
    )
    texts = {0: "", 1: ""}
    for each in found[:-1]:
        [choice] = each["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "x a b", 1: "y a b"}
    assert found[-1]["usage"]["total_tokens"] == 10
    assert all(stream.is_closed for stream in fake.streams)


def test_logprobs_of_a_completion_with_its_prompt(api: TestClient, fake: FakeClient) -> None:
    prompt = [{}, {7: Logprob(-0.5, 4, "lo"), 8: Logprob(-0.1, 1, "x")}]
    fake.answer = Generation([completion("<1>", "length", (1,))], 2, prompt)
    [choice] = complete(api, prompt="Hello", echo=True, logprobs=1).json()["choices"]
    assert choice["text"] == "Hello<1>"
    assert choice["logprobs"] == {
        "tokens": ["Hel", "lo", "<1>"],
        "token_logprobs": [None, -0.5, -1.0],
        "top_logprobs": [None, {"x": -0.1}, {"<1>": -1.0}],
        "text_offset": [0, 3, 5],
    }


ERRORS = [
    (FastServeError("INVALID_ARG", "`temperature`: got 9; allowed: less"), 400, "temperature"),
    (FastServeError("INVALID_ARG", "`max_tokens`: got 0; allowed: 1"), 400, "max_completion_tokens"),
    (FastServeError("UNAUTHENTICATED", "no key"), 401, None),
    (FastServeError("UNAVAILABLE", "the queue is full: 9 wait already"), 429, None),
    (FastServeError("UNAVAILABLE", "the worker died"), 503, None),
    (FastServeError("CANCELLED", "the request was cancelled"), 499, None),
    (FastServeError("INTERNAL", "oh"), 500, None),
    (FastServeError("DEADLINE_EXCEEDED", "late"), 504, None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "param"), ERRORS)
def test_errors_before_the_first_token(
    api: TestClient, fake: FakeClient, error: FastServeError, status: int, param: str | None, stream: bool
) -> None:
    fake.answer, fake.chunks = error, [error]
    answer = chat(api, stream=stream)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert complete(api, stream=stream).status_code == status


def test_the_seconds_of_a_quota_are_told(api: TestClient, fake: FakeClient) -> None:
    fake.answer = FastServeError("UNAVAILABLE", "tenant 'a' is over its quota; try again in 2.3 s")
    answer = chat(api)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_error_in_the_middle_is_the_last_event(api: TestClient, fake: FakeClient, path: str) -> None:
    part = Chunk([completion("H", None, (1,))], 3, None)
    fake.chunks = [part, FastServeError("INTERNAL", "the worker died")]
    body = (CHAT if "chat" in path else TEXT) | {"stream": True}
    assert events(api.post(path, json=body))[-1]["error"]["message"] == "the worker died"
    assert fake.streams[0].is_closed


def test_models_and_health(api: TestClient, fake: FakeClient) -> None:
    assert [each["id"] for each in api.get("/v1/models").json()["data"]] == [MODEL]
    assert api.get(f"/v1/models/{MODEL}").json()["object"] == "model"
    assert api.get("/health").status_code == 200
    fake.is_up = False
    assert api.get("/health").status_code == 503


def test_what_is_not_there(api: TestClient) -> None:
    assert api.get("/v1/models/other").status_code == 404
    assert chat(api, model="other").json()["error"]["code"] == "model_not_found"
    assert api.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert api.get("/v1/completions").status_code == 405


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("begins", [False, True])
def test_a_client_that_leaves_closes_its_stream(fake: FakeClient, path: str, begins: bool) -> None:
    """Before the first token, and after it."""
    fake.chunks = ([Chunk([completion("H", None, (1,))], 3, None)] if begins else []) + [None]
    body = json.dumps((CHAT if "chat" in path else TEXT) | {"stream": True}).encode()

    async def leave() -> None:
        app, left = create_app(lambda: fake, MODEL), asyncio.Event()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            if not begins:
                left.set()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body" and message.get("body"):
                left.set()

        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app(scope, receive, send), 10)

    asyncio.run(leave())
    assert [stream.is_closed for stream in fake.streams] == [True]


TIMING = Timing(
    queued_seconds=0.1,
    first_token_seconds=0.2,
    total_seconds=0.3,
    overtaken_by=4,
    cached_tokens=2,
    preemptions=1,
    recomputed_tokens=5,
    swapped_tokens=16,
)


def test_timing_is_shown_where_it_is_asked_for(api: TestClient, fake: FakeClient) -> None:
    fake.answer = Generation([completion("Hi", "stop", (1,))], 3, None, TIMING)
    fake.chunks = [
        Chunk([completion("H", None, (1,))], 3, None),
        Chunk([completion("", "stop")], 3, None, TIMING),
    ]
    said = chat(api, return_timing=True).json()
    assert said["fastserve"] == asdict(TIMING)
    assert said["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert "fastserve" not in chat(api).json()
    last = events(chat(api, return_timing=True, stream=True))[-1]
    assert (last["choices"], last["fastserve"]) == ([], asdict(TIMING))
    assert "usage" not in last
    several = complete(api, prompt=["x", "y"], return_timing=True).json()
    assert several["fastserve"] == [asdict(TIMING)] * 2
    assert several["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    usage: Any = {"stream": True, "stream_options": {"include_usage": True}}
    assert "fastserve" not in events(chat(api, **usage))[-1]
