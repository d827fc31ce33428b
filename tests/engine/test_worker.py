"""The worker's side of its pipe, in this process, around an engine that computes nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.engine.worker import _worker_main
from fastserve.types import EngineStats, Shutdown, encode

FILES = ModelFiles(Path("none"), Path("none"))


class Engine:
    """Has work, and raises at the first step, if it is given an error to raise."""

    max_model_len = 16
    block_size = 16
    num_preempted = 0

    def on_loss(self, tell: Callable[[Exception], None]) -> None:
        pass

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.has_work = error is not None

    def step(self) -> Any:
        assert self.error is not None
        raise self.error

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 64, 64, 64, [], [], 64, 0, 0, 0, {}, 0, 0, 0, 0, 0)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(parent's end, worker's end)."""
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    parent, worker = Pipe()
    with parent, worker:
        yield parent, worker


def work(connection: Any, engine: Engine) -> None:
    _worker_main(Config(), FILES, 0, connection, lambda config, files, replica: engine)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("error", [OSError("no space left"), EOFError(), RuntimeError("lost")], ids=repr)
def test_an_error_of_a_step_is_not_taken_for_the_parent_s_end(pipe: Any, error: Exception) -> None:
    """Whatever its type, it ends the worker with a traceback."""
    with pytest.raises(type(error)) as raised:
        work(pipe[1], Engine(error))
    assert raised.value is error


def test_a_worker_whose_parent_is_gone_leaves_quietly(pipe: Any) -> None:
    pipe[0].close()
    work(pipe[1], Engine())


def test_a_worker_leaves_when_it_is_told_to(pipe: Any) -> None:
    pipe[0].send_bytes(encode(Shutdown()))
    work(pipe[1], Engine())
