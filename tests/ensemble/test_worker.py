"""The real `Worker`, its process and its pipe, around an engine without a model."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.engine.worker import Worker
from fastserve.engine.worker_pipe import FromWorker
from fastserve.types import Add, OutputOptions, Ready, Request, SamplingParams, StepOutput

WAIT_SECONDS = 20.0
FILES = ModelFiles(Path("none"), Path("none"))


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `fake_engine`, as the worker's process will import it."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import fake_engine

    return fake_engine


def a_request(uid: str, num_tokens: int = 1000, request_id: str = "") -> Request:
    return Request(
        uid,
        request_id,
        "x" * 4000,
        [40_000] * num_tokens,
        SamplingParams(),
        OutputOptions(),
        0,
        "",
        0.0,
        None,
    )


class Parent:
    """Whoever starts a worker: what came of it, and a lock as `EngineModel` has one."""

    def __init__(self, load: Any, on_step: Callable[[StepOutput], None] = lambda step: None) -> None:
        self.lock = threading.Lock()
        self.has_step = threading.Event()
        """A step has been read, and waits for the lock if another has it."""
        self.deaths: list[str] = []
        self.uids: list[str] = []
        self._on_step = on_step
        self._changed = threading.Condition()
        self._is_ready = False
        self.worker = Worker(Config(), FILES, 0, self._on_message, self._on_death, load=load)
        self.worker.start()

    def _on_message(self, message: FromWorker) -> None:
        if isinstance(message, StepOutput):
            self.has_step.set()
        with self.lock, self._changed:
            if isinstance(message, Ready):
                self._is_ready = True
            else:
                self._on_step(message)
                self.uids += [output.uid for output in message.outputs]
            self._changed.notify_all()

    def _on_death(self, cause: str) -> None:
        with self._changed:
            self.deaths.append(cause)
            self._changed.notify_all()

    def send(self, *requests: Request) -> None:
        with self.lock:
            for request in requests:
                self.worker.send(Add(request))

    def wait(self, holds: Callable[[Parent], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: holds(self), WAIT_SECONDS), "nothing came any more"


@pytest.fixture
def parents() -> Iterator[list[Parent]]:
    """Those started in a test; all are stopped after it."""
    started: list[Parent] = []
    yield started
    for parent in started:
        parent.worker.stop(0.0)


def test_a_full_pipe_in_both_directions_stops_nothing(fake_engine: Any, parents: list[Parent]) -> None:
    """Long prompts are sent under the lock that the reader needs, while the worker sends more than fits."""
    parent = Parent(fake_engine.load_large)
    parents.append(parent)
    parent.wait(lambda each: each._is_ready)
    requests = [a_request(str(number)) for number in range(240)]

    def burst() -> None:
        with parent.lock:
            for request in requests[:3]:
                parent.worker.send(Add(request))
            assert parent.has_step.wait(WAIT_SECONDS)
            assert parent.worker._connection.poll(WAIT_SECONDS)  # the next answer has begun to come
            for request in requests[3:]:
                parent.worker.send(Add(request))

    threading.Thread(target=burst, daemon=True).start()
    parent.wait(lambda each: len(each.uids) == len(requests))
    assert sorted(parent.uids, key=int) == [request.uid for request in requests]


def test_what_is_sent_while_it_starts_is_served(fake_engine: Any, parents: list[Parent]) -> None:
    parent = Parent(fake_engine.load_small)
    parents.append(parent)
    parent.send(a_request("early"))
    parent.wait(lambda each: each.uids == ["early"])


def test_a_worker_that_was_stopped_computes_nothing_and_loses_nothing(
    fake_engine: Any, parents: list[Parent]
) -> None:
    parent = Parent(fake_engine.load_small)
    parents.append(parent)
    parent.wait(lambda each: each._is_ready)
    requests = [a_request(str(number)) for number in range(240)]
    assert parent.worker.pid is not None
    os.kill(parent.worker.pid, signal.SIGSTOP)
    parent.send(*requests)
    computed = parent.worker.cpu_seconds()
    assert computed > 0.0
    assert parent.worker.cpu_seconds() == computed
    os.kill(parent.worker.pid, signal.SIGCONT)
    parent.wait(lambda each: len(each.uids) == len(requests))
    parent.worker.stop()
    assert parent.worker.cpu_seconds() == 0.0


def test_a_message_that_cannot_be_handled_ends_the_worker_and_says_why(
    fake_engine: Any, parents: list[Parent]
) -> None:
    def broken(step: StepOutput) -> None:
        raise ValueError("shared memory is full")

    parent = Parent(fake_engine.load_small, broken)
    parents.append(parent)
    parent.send(a_request("a"), a_request("b"))
    parent.wait(lambda each: bool(each.deaths))
    assert parent.deaths == ["was ended (it could not be understood: ValueError: shared memory is full)"]
    assert parent.uids == []


def test_a_message_that_cannot_be_decoded_ends_the_worker_and_says_why(
    fake_engine: Any, parents: list[Parent]
) -> None:
    parent = Parent(fake_engine.load_small)
    parents.append(parent)
    parent.send(a_request("a"), a_request("b", request_id="garbage"), a_request("c"))
    parent.wait(lambda each: bool(each.deaths))
    assert "could not be understood: ValidationError" in parent.deaths[0]
    assert parent.uids == ["a"]


def test_a_worker_that_fails_is_told_of_with_all_that_it_had_sent(
    fake_engine: Any, parents: list[Parent]
) -> None:
    parent = Parent(fake_engine.load_large)
    parents.append(parent)
    parent.send(*(a_request(str(number)) for number in range(3)))
    parent.wait(lambda each: len(each.uids) == 3)
    parent.send(a_request("poison", request_id="poison"))
    parent.wait(lambda each: bool(each.deaths))
    assert parent.deaths == ["ended (code 1)"]


def test_a_worker_that_cannot_load_is_told_of(fake_engine: Any, parents: list[Parent]) -> None:
    parent = Parent(fake_engine.load_nothing)
    parents.append(parent)
    parent.wait(lambda each: each.deaths == ["ended (code 1)"])


def test_a_stopped_worker_is_not_mourned(fake_engine: Any) -> None:
    parent = Parent(fake_engine.load_small)
    parent.send(a_request("a"))
    parent.wait(lambda each: each.uids == ["a"])
    parent.worker.stop()
    assert parent.deaths == []
    assert not parent.worker._process.is_alive()
