"""The model `preprocess`: what it answers, and that a guide which is tried out holds up nobody."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastserve.config import Config
from fastserve.errors import RequestError
from fastserve.text.input_processor import InputProcessor
from fastserve.types import Guide, Request


class Compiler:
    """In place of the processes that try guides out: each guide waits until `release`."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def validate(self, guide: Guide, field: str) -> None:
        assert self.release.wait(20)
        if guide.regex == "(":
            raise RequestError(f"`{field}`: it does not compile: unclosed group")
        if guide.regex == "lost":
            raise MemoryError("no room for it")

    def close(self) -> None:
        pass


class FakeTokenizer:
    """A token for each byte."""

    vocab_size = 256
    eos_token_ids: list[int] = []  # noqa: RUF012

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return list(text.encode())


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def model(pb_utils: Any, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    preprocess = importlib.import_module("fastserve.ensemble.preprocess")
    tokenizer: Any = FakeTokenizer()
    input_processor: Any = InputProcessor(Config(), tokenizer, 64, 256)
    input_processor._guides = compiler
    monkeypatch.setattr(preprocess, "_load_input_processor", lambda config: input_processor)
    model = preprocess.PreprocessModel()
    model.initialize({})
    yield model
    compiler.release.set()
    model.finalize()


def request(pb_utils: Any, text: str, regex: str | None = None) -> Any:
    parameters = {} if regex is None else {"structured_outputs": f'{{"regex": "{regex}"}}'}
    tensor = pb_utils.Tensor("text_input", np.array([text.encode()], dtype=object))
    return pb_utils.InferenceRequest(inputs=[tensor], parameters=parameters)


def built(response: Any) -> Request:
    from fastserve.ensemble.messaging import read_message  # the fake server must be in place first

    return read_message("request", response.output_tensors()[0].as_numpy()[0], Request)


def test_plain_requests_are_answered_in_order_beside_guides_that_wait(
    pb_utils: Any, model: Any, compiler: Compiler
) -> None:
    guided = [request(pb_utils, f"guided {index}", "a") for index in range(10)]
    assert model.execute(guided) == [None] * 10
    responses = model.execute([request(pb_utils, "first"), request(pb_utils, "second")])
    assert [built(response).prompt for response in responses] == ["first", "second"]
    assert not any(each.sender.is_final for each in guided)
    compiler.release.set()
    for index, each in enumerate(guided):
        each.sender.wait()
        [response] = each.sender.responses
        assert built(response).prompt == f"guided {index}"
        assert built(response).sampling.guide == Guide(regex="a")


@pytest.mark.parametrize(
    ("regex", "code", "sentence"),
    [
        ("(", "INVALID_ARG", "`structured_outputs.regex`: it does not compile"),
        ("lost", "INTERNAL", "MemoryError"),
    ],
)
def test_a_guide_that_fails_is_answered(
    pb_utils: Any, model: Any, compiler: Compiler, regex: str, code: str, sentence: str
) -> None:
    compiler.release.set()
    guided = request(pb_utils, "a", regex)
    assert model.execute([guided]) == [None]
    guided.sender.wait()
    assert sentence in guided.sender.error.message()
    assert guided.sender.error.code() == getattr(pb_utils.TritonError, code)


def test_so_many_guides_wait_and_no_more(pb_utils: Any, model: Any, compiler: Compiler) -> None:
    from fastserve.ensemble.guide_checks import MAX_GUIDED_REQUESTS

    waiting = [request(pb_utils, "a", "a") for _ in range(MAX_GUIDED_REQUESTS)]
    assert model.execute(waiting) == [None] * MAX_GUIDED_REQUESTS
    [refused] = model.execute([request(pb_utils, "a", "a")])
    assert refused.error().code() == pb_utils.TritonError.UNAVAILABLE
    assert "`structured_outputs.regex`" in refused.error().message()
    compiler.release.set()
    for each in waiting:
        each.sender.wait()
    accepted = request(pb_utils, "a", "a")
    assert model.execute([accepted]) == [None]
    accepted.sender.wait()
    assert accepted.sender.error is None


def test_what_is_refused_at_once_is_counted(pb_utils: Any, model: Any) -> None:
    [response] = model.execute([request(pb_utils, "")])
    assert response.error().code() == pb_utils.TritonError.INVALID_ARG
    assert pb_utils.server.metric("fastserve_requests_total", outcome="rejected") == 1


def test_a_guided_request_whose_answer_is_lost_is_told_so(
    pb_utils: Any, model: Any, compiler: Compiler, short_shared_memory: None
) -> None:
    guided = request(pb_utils, "a", "a")
    guided.sender.fail_next()
    assert model.execute([guided]) == [None]
    compiler.release.set()
    guided.sender.wait()
    assert guided.sender.error.code() == pb_utils.TritonError.UNAVAILABLE
    assert "the answer could not be sent: no shared memory" in guided.sender.error.message()


def test_a_server_that_is_stopping_takes_no_more(
    pb_utils: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSERVE_STOPPING", str(tmp_path))
    [response] = model.execute([request(pb_utils, "a")])
    assert response.error().code() == pb_utils.TritonError.UNAVAILABLE
    assert "the server is stopping" in response.error().message()


def test_a_request_whose_answer_cannot_be_made_fails_alone(
    pb_utils: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while shared memory is full: the whole batch had the server's error."""
    from fastserve.ensemble import preprocess

    message_response, failures = preprocess.message_response, [OSError("no space left on device")]

    def fail_first(name: str, message: Any) -> Any:
        if failures:
            raise failures.pop()
        return message_response(name, message)

    monkeypatch.setattr(preprocess, "message_response", fail_first)
    bad, good = model.execute([request(pb_utils, "a"), request(pb_utils, "b")])
    assert bad.error().message() == "INTERNAL: OSError: no space left on device"
    assert built(good).prompt == "b"
