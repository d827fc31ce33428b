"""Both protocols, sync and async, against a server that does as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import pytest

from fastserve_client import AsyncClient, Chunk, Client, DeadlineExceeded, FastServeError, Generation, backoff

if TYPE_CHECKING:
    from tests.client.conftest import FakeServer

    Protocol = Literal["grpc", "http"]


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> Protocol:
    return request.param


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.001)


class Caller:
    """One way to make a call, sync or async, so that a test is written once."""

    def __init__(self, server: FakeServer, protocol: Protocol, is_async: bool) -> None:
        self.server = server
        self._protocol = protocol
        self._is_async = is_async

    def generate(self, *arguments: Any, retries: int = 2, **options: Any) -> Generation:
        return self._call("generate", arguments, retries, options)

    def chunks(self, *arguments: Any, retries: int = 2, **options: Any) -> list[Chunk]:
        return self._call("stream", arguments, retries, options)

    def cancel(self, request_id: str) -> None:
        self._call("cancel", (request_id,), 2, {})

    def is_ready(self) -> bool:
        return self._call("is_ready", (), 2, {})

    def _call(self, method: str, arguments: tuple[Any, ...], retries: int, options: dict[str, Any]) -> Any:
        url = self.server.urls[self._protocol]
        if self._is_async:
            return asyncio.run(self._call_async(url, method, arguments, retries, options))
        with Client(url, self._protocol, retries=retries, headers={"X-Api-Key": "secret"}) as client:
            result = getattr(client, method)(*arguments, **options)
            return list(result) if method == "stream" else result

    async def _call_async(
        self, url: str, method: str, arguments: tuple[Any, ...], retries: int, options: dict[str, Any]
    ) -> Any:
        async with AsyncClient(
            url, self._protocol, retries=retries, headers={"X-Api-Key": "secret"}
        ) as client:
            result = getattr(client, method)(*arguments, **options)
            return [chunk async for chunk in result] if method == "stream" else await result


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def caller(request: pytest.FixtureRequest, server: FakeServer, protocol: Protocol) -> Caller:
    return Caller(server, protocol, request.param)


def test_what_is_sent(caller: Caller) -> None:
    server = caller.server
    server.script = [[server.token("x", "stop")]]
    caller.generate(
        "Once",
        max_tokens=8,
        stop=["\n"],
        priority=5,
        tenant="blue",
        expected_output_tokens=6,
        headers={"Authorization": "Bearer key"},
        timeout=5,
        request_id="r1",
        logprobs=1,
    )
    (received,) = server.received
    assert json.loads(received.inputs.pop("sampling_parameters")) == {
        "max_tokens": 8,
        "stop": ["\n"],
        "logprobs": 1,
    }
    assert received.inputs == {
        "text_input": "Once",
        "stream": False,
        "exclude_input_in_output": True,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_token_ids": False,
        "return_logprobs": True,
        "return_cumulative_logprob": False,
        "priority": 5,
        "tenant": "blue",
        "expected_output_tokens": 6,
    }
    assert (received.model, received.request_id) == ("fastserve", "r1")
    assert received.timeout_us is not None
    assert 0 < received.timeout_us <= 5_000_000
    assert received.headers["x-api-key"] == "secret"
    assert received.headers["authorization"] == "Bearer key"


def test_the_other_prompts(caller: Caller) -> None:
    server = caller.server
    server.script = [[server.token("x", "stop")]]
    caller.chunks(messages=[{"role": "user", "content": "Hé"}])
    caller.chunks(prompt_token_ids=[7])
    chat, tokens = server.received
    assert json.loads(chat.inputs["messages"]) == [{"role": "user", "content": "Hé"}]
    assert "text_input" not in chat.inputs
    assert tokens.inputs["prompt_token_ids"] == [7]
    assert tokens.inputs["stream"] is True
    assert tokens.timeout_us is None
    assert chat.request_id != tokens.request_id


def test_chunks_come_as_they_are_sent(caller: Caller) -> None:
    server = caller.server
    server.script = [[server.token("é", token_ids=[1]), server.token("", "length", token_ids=[2])]]
    chunks = caller.chunks("x")
    assert [(chunk.text, chunk.finish_reason, chunk.token_ids) for chunk in chunks] == [
        ("é", None, [1]),
        ("", "length", [2]),
    ]


def test_generate_returns_the_whole(caller: Caller) -> None:
    server = caller.server
    server.script = [
        [
            {
                "text_output": [" a b", " c"],
                "finish_reason": ["length", "stop"],
                "num_input_tokens": [3],
                "num_output_tokens": [2, 1],
                "token_ids": [10, 11, 12],
                "cumulative_logprob": [-0.5, -2.0],
            }
        ]
    ]
    generation = caller.generate("x", n=2)
    assert [(c.text, c.finish_reason, c.token_ids) for c in generation.completions] == [
        (" a b", "length", [10, 11]),
        (" c", "stop", [12]),
    ]
    assert generation.num_input_tokens == 3
    assert generation.cumulative_logprob == -0.5


@pytest.mark.parametrize("code", ["INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"])
def test_an_error_has_the_servers_code_and_sentence(caller: Caller, code: str) -> None:
    server = caller.server
    server.script = [[server.refusal(code, "`top_p`: got 2")]]
    with pytest.raises(FastServeError) as caught:
        caller.generate("x", top_p=2.0)
    assert (caught.value.code, caught.value.message) == (code, "`top_p`: got 2")


def test_unavailable_is_tried_again(caller: Caller) -> None:
    server = caller.server
    full = server.refusal("UNAVAILABLE", "the queue is full")
    server.script = [[full], [full], [server.token("x", "stop")]]
    assert caller.generate("x", request_id="same").text == "x"
    assert [received.request_id for received in server.received] == ["same"] * 3


def test_a_tenant_over_its_quota_waits_as_the_server_says(caller: Caller) -> None:
    server = caller.server
    over = server.refusal("UNAVAILABLE", "tenant 'a' is over its quota; try again in 0.300 s")
    server.script = [[over], [server.token("x", "stop")]]
    start = time.monotonic()
    assert caller.generate("x").text == "x"
    assert time.monotonic() - start >= 0.3
    server.script = [[server.refusal("UNAVAILABLE", "tenant 'a' is over its quota; try again in 30.000 s")]]
    with pytest.raises(FastServeError) as caught:
        caller.generate("x", timeout=20)
    assert (caught.value.code, caught.value.retry_after) == ("UNAVAILABLE", 30.0)
    assert len(server.received) == 3


def test_retries_are_bounded(caller: Caller) -> None:
    server = caller.server
    server.script = [[server.refusal("UNAVAILABLE", "the queue is full")]]
    with pytest.raises(FastServeError, match="the queue is full"):
        caller.generate("x", retries=1)
    assert len(server.received) == 2


@pytest.mark.parametrize("code", ["INVALID_ARG", "CANCELLED", "INTERNAL"])
def test_other_errors_are_not_tried_again(caller: Caller, code: str) -> None:
    server = caller.server
    server.script = [[server.refusal(code, "no")]]
    with pytest.raises(FastServeError):
        caller.generate("x")
    assert len(server.received) == 1


def test_what_has_begun_is_not_tried_again(caller: Caller) -> None:
    server = caller.server
    server.script = [[server.token("x"), server.refusal("UNAVAILABLE", "the worker died")]]
    with pytest.raises(FastServeError, match="the worker died") as caught:
        caller.chunks("x")
    assert caught.value.code == "UNAVAILABLE"
    assert len(server.received) == 1


@pytest.mark.parametrize("steps", [0, 1], ids=["before the first response", "after it"])
def test_a_deadline_ends_the_call_on_both_sides(caller: Caller, steps: int) -> None:
    server = caller.server
    server.script = [[*[server.token("x")] * steps, server.hang()]]
    with pytest.raises(TimeoutError) as caught:
        caller.chunks("x", timeout=0.1)
    assert isinstance(caught.value, DeadlineExceeded)
    assert server.client_gone.wait(5)
    assert len(server.received) == 1


def test_a_deadline_is_that_of_the_whole_call(caller: Caller) -> None:
    """However often something comes: a time limit of each read would never pass."""
    caller.server.script = [[caller.server.endless()]]
    with pytest.raises(DeadlineExceeded):
        caller.chunks("x", timeout=0.3)
    assert caller.server.client_gone.wait(5)


def test_the_characters_that_some_take_for_line_ends_stay_in_the_text(caller: Caller) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x1cf"
    caller.server.script = [[caller.server.token(text, "stop")]]
    assert caller.generate("x").text == text


def test_an_answer_without_a_response_is_an_error(caller: Caller) -> None:
    caller.server.script = [[]]
    with pytest.raises(FastServeError, match="without a response"):
        caller.generate("x")


def test_cancel_goes_to_a_model_for_clients(caller: Caller) -> None:
    caller.server.script = [[{"text_output": [""]}]]
    caller.cancel("r1")
    (received,) = caller.server.received
    assert (received.model, received.inputs) == ("fastserve_infer", {"cancel": "r1"})


def test_a_cancel_that_fails_says_so(caller: Caller) -> None:
    caller.server.script = [[caller.server.refusal("INVALID_ARG", "`cancel`: got ''")]]
    with pytest.raises(FastServeError, match="`cancel`"):
        caller.cancel("")


def test_ready_or_not(caller: Caller) -> None:
    assert caller.is_ready()
    caller.server.ready = False
    assert not caller.is_ready()


def test_nobody_listens(caller: Caller) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for protocol in ("grpc", "http"):
            caller.server.urls[protocol] = f"127.0.0.1:{unused.getsockname()[1]}"
        assert not caller.is_ready()
        with pytest.raises(FastServeError) as caught:
            caller.generate("x")
    assert caught.value.code == "UNAVAILABLE"


def test_a_server_that_is_slow_to_accept_is_not_taken_for_a_dead_one(
    server: FakeServer, protocol: Protocol
) -> None:
    """Its first bytes come 2.5 s late, as they do when other programs have the machine's cores."""
    server.script = [[server.token("x", "stop")]]
    with (
        slow_proxy(server.urls[protocol], seconds=2.5) as url,
        Client(url, protocol, retries=0) as client,
    ):
        assert client.generate("x").text == "x"


@contextmanager
def slow_proxy(url: str, seconds: float) -> Iterator[str]:
    """Hands on the bytes of one connection, beginning so late; its address."""
    host, port = url.split(":")
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(3) as threads:

        def hand_on(source: socket.socket, target: socket.socket) -> None:
            while piece := source.recv(65536):
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)

        def serve() -> None:
            near, _ = listening.accept()
            time.sleep(seconds)  # the slowness itself
            far = socket.create_connection((host, int(port)))
            with near, far, contextlib.suppress(OSError):
                back = threads.submit(hand_on, far, near)
                hand_on(near, far)
                back.result()

        threads.submit(serve)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_leaving_a_stream_cancels_it(server: FakeServer, protocol: Protocol) -> None:
    server.script = [[server.token("x"), server.hang()]]
    with Client(server.urls[protocol], protocol) as client, client.stream("x") as stream:
        assert next(stream).text == "x"
    assert server.client_gone.wait(5)
    assert list(stream) == []


def test_leaving_an_async_stream_cancels_it(server: FakeServer, protocol: Protocol) -> None:
    async def leave() -> list[Chunk]:
        async with AsyncClient(server.urls[protocol], protocol) as client:
            async with client.stream("x") as stream:
                assert (await anext(stream)).text == "x"
            return [chunk async for chunk in stream]

    server.script = [[server.token("x"), server.hang()]]
    assert asyncio.run(leave()) == []
    assert server.client_gone.wait(5)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_over_grpc_a_call_that_has_failed_ends_by_itself(server: FakeServer, is_async: bool) -> None:
    """Triton server 2.51 was seen to keep requests of calls that did not."""
    server.linger_seconds = 0.2
    server.script = [[server.refusal("INVALID_ARG", "no")]]
    with pytest.raises(FastServeError):
        Caller(server, "grpc", is_async).generate("x")
    assert server.has_lingered.wait(10)
    assert not server.was_left_first


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_over_http_what_has_not_begun_is_cancelled_by_id(server: FakeServer, is_async: bool) -> None:
    async def leave() -> None:
        async with AsyncClient(server.urls["http"], "http") as client:
            asking = asyncio.create_task(client.generate("x", request_id="r1"))
            while not server.received:
                await asyncio.sleep(0.001)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    server.script = [[server.hang()], [{"text_output": [""]}]]
    if is_async:
        asyncio.run(leave())
    else:
        with Client(server.urls["http"], "http") as client:
            client.stream("x", request_id="r1").close()
    assert server.client_gone.wait(5)
    received = {request.model: request for request in server.received}
    assert received["fastserve"].request_id == received["fastserve_infer"].inputs["cancel"] == "r1"
    assert len(server.received) == 2


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_close_wakes_the_thread_that_reads(
    request: pytest.FixtureRequest, protocol: Protocol, tls: bool
) -> None:
    server: FakeServer = request.getfixturevalue("tls_server" if tls else "server")
    options = {"ssl": True, **request.getfixturevalue("certificates").of_client()} if tls else {}
    server.script = [[server.token("x"), server.hang()]]
    with Client(server.urls[protocol], protocol, **options) as client:
        stream = client.stream("x")
        assert next(stream).text == "x"
        rest: list[Chunk] = []
        reader = threading.Thread(target=lambda: rest.extend(stream))
        reader.start()
        stream.close()
        reader.join(5)
        assert not reader.is_alive()
    assert rest == []
    assert server.client_gone.wait(5)


def test_close_wakes_the_task_that_reads(server: FakeServer, protocol: Protocol) -> None:
    async def close_while_reading() -> list[Chunk]:
        async with AsyncClient(server.urls[protocol], protocol) as client:
            stream = client.stream("x")
            assert (await anext(stream)).text == "x"

            async def read() -> list[Chunk]:
                return [chunk async for chunk in stream]

            reader = asyncio.create_task(read())
            await asyncio.sleep(0)  # lets it begin to read
            await stream.close()
            return await asyncio.wait_for(reader, 5)

    server.script = [[server.token("x"), server.hang()]]
    assert asyncio.run(close_while_reading()) == []


def test_a_client_is_shared_by_threads(server: FakeServer, protocol: Protocol) -> None:
    server.script = [[server.token("x"), server.token("y", "stop")]]
    texts: list[str] = []
    with Client(server.urls[protocol], protocol) as client:
        threads = [
            threading.Thread(target=lambda: texts.append(client.stream("p").read().text)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == ["xy"] * 8
