"""The embedded API's threads, over a fake runner: every task ends, whatever happens to the engine."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fastserve import Model, ModelServer
from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.errors import ErrorCode, RequestError
from fastserve.text.input_processor import InputProcessor
from fastserve.text.tokenizer import Tokenizer, load_tokenizer

SECONDS = 20.0
"""More than any task here takes."""
WORD = 260
"""A token that the tests let the model repeat."""
REPEAT: dict[str, Any] = {"temperature": 0, "logit_bias": {WORD: 100.0}, "ignore_eos": True}


@pytest.fixture(scope="module")
def tokenizer(default_model: ModelFiles) -> Tokenizer:
    return load_tokenizer(default_model)


@pytest.fixture
def model(fake_engine: Any, tokenizer: Tokenizer) -> Model:
    engine = fake_engine(tokenizer.vocab_size, num_blocks=600)
    return Model(
        engine, tokenizer, InputProcessor(Config(), tokenizer, engine.max_model_len, tokenizer.vocab_size)
    )


@pytest.fixture
def gate(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(event that the engine sets when it begins a step, event that it waits for then)."""
    reached, opened = threading.Event(), threading.Event()
    run = model.engine.runner.run

    def run_behind_gate(plan: Any) -> Any:
        reached.set()
        assert opened.wait(SECONDS)
        return run(plan)

    monkeypatch.setattr(model.engine.runner, "run", run_behind_gate)
    yield reached, opened
    opened.set()


@pytest.mark.parametrize("cancel_works", [True, False])
def test_when_the_engine_fails_every_task_ends(
    model: Any, gate: Any, monkeypatch: pytest.MonkeyPatch, cancel_works: bool
) -> None:
    reached, opened = gate
    server = ModelServer(model).start()
    tasks = [server.submit([5, number], max_tokens=50, **REPEAT) for number in range(3)]
    assert reached.wait(SECONDS)
    tasks.append(server.submit([5, 9], max_tokens=50, **REPEAT))  # still on its way to the engine
    model.engine.runner.is_lost = True
    if not cancel_works:
        monkeypatch.setattr(model.engine, "cancel", None)
    opened.set()
    for task in tasks:
        with pytest.raises(
            RequestError, match="the engine has failed: RuntimeError: the device is lost"
        ) as error:
            task.result(SECONDS)
        assert error.value.code is ErrorCode.INTERNAL
    with pytest.raises(RequestError, match="the engine has failed"):
        server.submit([5], **REPEAT).result(SECONDS)
    server.stop()
    if cancel_works:
        model.engine.runner.is_lost = False
        assert model.predict("again", max_tokens=2, **REPEAT)


def test_a_task_submitted_while_the_server_stops_ends(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, parsing, stopped = ModelServer(model).start(), threading.Event(), threading.Event()
    parse = model.input_processor.parse

    def parse_slowly(*args: Any, **kwargs: Any) -> Any:
        parsing.set()
        assert stopped.wait(SECONDS)
        return parse(*args, **kwargs)

    monkeypatch.setattr(model.input_processor, "parse", parse_slowly)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: server.submit([5], **REPEAT).result(SECONDS))
        assert parsing.wait(SECONDS)
        server.stop()
        stopped.set()
        with pytest.raises(RuntimeError, match="the server is not running"):
            future.result(SECONDS)


def test_tasks_end_when_their_server_stops_and_those_of_others_go_on(model: Any, gate: Any) -> None:
    reached, opened = gate
    stopping, other = ModelServer(model).start(), ModelServer(model).start()
    cancelled = [stopping.submit([5, number], max_tokens=500, **REPEAT) for number in range(2)]
    kept = other.submit([6], max_tokens=20, **REPEAT)
    assert reached.wait(SECONDS)
    stopping.stop()
    for task in cancelled:
        with pytest.raises(RequestError, match="the server was stopped"):
            task.result(SECONDS)
    opened.set()
    assert kept.result(SECONDS)
    other.stop()
    assert model.engine.runner.num_tokens < 100
    assert model.engine.stats().kv_blocks_used == 0


def test_threads_may_predict_at_once(model: Any) -> None:
    barrier = threading.Barrier(4)

    def predict(number: int) -> list[str]:
        barrier.wait(SECONDS)
        return [model.predict([f"text {number}"], max_tokens=8, **REPEAT)[0] for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(predict, range(4)))
    assert {text for each in texts for text in each} == {model.tokenizer.decode([WORD] * 8)}


def test_a_prediction_beside_a_server(model: Any) -> None:
    with ModelServer(model) as server:
        task = server.submit([5], max_tokens=200, **REPEAT)
        assert model.predict("text", max_tokens=3, **REPEAT)
        assert len(task.result(SECONDS)) > 200


def test_a_stop_string_ends_a_task_that_nobody_waits_for(model: Any) -> None:
    word = model.tokenizer.decode([WORD])
    with ModelServer(model) as server:
        forgotten = server.submit([5], max_tokens=300, stop=[word * 3], **REPEAT)
        server.submit([6], max_tokens=300, **REPEAT).result(SECONDS)
        computed = model.engine.runner.num_tokens
        assert forgotten.result(SECONDS) == ""
    assert computed < 320


def test_any_number_of_threads_may_wait_for_a_task(model: Any) -> None:
    with ModelServer(model) as server, ThreadPoolExecutor(4) as pool:
        task = server.submit([5], max_tokens=50, **REPEAT)
        texts = list(pool.map(lambda _: task.result(SECONDS), range(4)))
    assert texts == [model.tokenizer.decode([WORD] * 50)] * 4


def test_an_answer_that_cannot_be_decoded_fails_its_task(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelServer(model) as server:
        good = server.submit([6], max_tokens=50, **REPEAT)
        bad = server.submit([5], max_tokens=500, **REPEAT)
        monkeypatch.setattr(bad._output_processor, "push", None)
        with pytest.raises(TypeError):
            bad.result(SECONDS)
        assert good.result(SECONDS)
    assert model.engine.stats().kv_blocks_used == 0


def test_a_running_server_is_not_started_again(model: Any) -> None:
    with ModelServer(model) as server, pytest.raises(RuntimeError, match="running already"):
        server.start()
