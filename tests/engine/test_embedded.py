"""The embedded API on the real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastserve import Model, ModelServer
from fastserve.config import ConfigError, TenantQuota
from fastserve.errors import ErrorCode, RequestError

PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
ENDLESS: dict[str, Any] = {"temperature": 0, "max_tokens": 4000, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(default_model_path: Path) -> Model:
    return Model.load(str(default_model_path), kv_cache_bytes=1 << 28)


@pytest.fixture
def server(model: Model) -> Iterator[ModelServer]:
    with ModelServer(model) as server:
        yield server


def test_predict_takes_a_text_a_list_or_a_chat(model: Model) -> None:
    text = model.predict(PROMPT, **GREEDY)
    assert "Paris" in text
    assert model.predict([PROMPT, "One, two,"], **GREEDY)[0] == text
    assert "Paris" in model.predict(
        [{"role": "user", "content": "What is the capital of France? One word."}], **GREEDY
    )


def test_a_task_streams_and_gives_its_result_again(server: ModelServer) -> None:
    task = server.submit(PROMPT, **GREEDY)
    pieces = list(task)
    assert len(pieces) > 1
    assert task.result() == "".join(pieces)
    assert [response.finish_reason for response in task.responses()][-1] == ["length"]


def test_a_stop_string_ends_a_task(server: ModelServer) -> None:
    text = server.submit("1, 2, 3, 4,", stop=["9"], **ENDLESS).result(timeout=60)
    assert text.rstrip().endswith("8,")


def test_a_cancelled_task_raises(server: ModelServer) -> None:
    task = server.submit("Count up.", **ENDLESS)
    next(iter(task))
    task.cancel()
    with pytest.raises(RequestError) as error:
        task.result(timeout=30)
    assert error.value.code is ErrorCode.CANCELLED


def test_a_task_that_is_not_done_in_time_says_so(server: ModelServer) -> None:
    task = server.submit("Count up.", **ENDLESS)
    with pytest.raises(TimeoutError):
        task.result(timeout=0.2)
    task.cancel()


def test_bad_input_is_refused_at_once(server: ModelServer) -> None:
    with pytest.raises(RequestError, match="temperature"):
        server.submit(PROMPT, temperature=-1)


def test_stopping_fails_what_is_in_flight(model: Model) -> None:
    server = ModelServer(model).start()
    task = server.submit("Count up.", **ENDLESS)
    next(iter(task))
    server.stop()
    with pytest.raises(RequestError, match="stopped"):
        task.result(timeout=10)
    assert "Paris" in model.predict(PROMPT, **GREEDY)


def test_a_priority_and_a_hint_are_checked(server: ModelServer) -> None:
    with pytest.raises(RequestError, match=r"`priority`: got 11; allowed: an integer from -10 to 10"):
        server.submit(PROMPT, priority=11)
    with pytest.raises(RequestError, match=r"`expected_output_tokens`: got 9; .* which is 8"):
        server.submit(PROMPT, expected_output_tokens=9, max_tokens=8)
    task = server.submit(PROMPT, priority=10, expected_output_tokens=4, **GREEDY)
    assert (task.request.expected_output_tokens, "Paris" in task.result()) == (4, True)


def test_quotas_are_the_servers() -> None:
    quotas = {"a": TenantQuota(tokens_in_flight=9)}
    with pytest.raises(ConfigError, match="`tenant_quotas`: got some; allowed: none without the server"):
        Model.load(tenant_quotas=quotas)
