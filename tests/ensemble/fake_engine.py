"""Engines without a model, for a real `Worker`; the spawned process imports them from here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.types import Add, EngineStats, Outcome, Request, SequenceOutput, Shutdown, StepOutput

LARGE_ANSWER = 60_000
"""Token ids of an answer of about 300 kB: more than the buffer of a pipe holds."""


class FakeEngine:
    """Answers each request with the whole of an answer in one step, one request a step.

    The client's id `poison` makes it fail, and `garbage` makes it say what no parent understands.
    """

    max_model_len = 2048
    block_size = 16
    num_preempted = 0
    gives_way = False

    def on_loss(self, tell: Callable[[Exception], None]) -> None:
        pass

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._requests: list[Request] = []
        self._received = 0

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, message: Add) -> None:
        request = message.request
        if request.request_id == "poison":
            raise RuntimeError("poisoned")
        self._requests.append(request)
        self._received += 1

    def cancel(self, uid: str, outcome: Outcome, index: int | None = None) -> None:
        return

    def step(self) -> StepOutput:
        request = self._requests.pop(0)
        if request.request_id == "garbage":
            return cast(StepOutput, Shutdown())
        output = SequenceOutput(request.uid, token_ids=[100_000] * self._num_tokens, outcome=Outcome.STOP)
        return StepOutput([output], self.stats())

    def stats(self) -> EngineStats:
        return EngineStats(self._received, 0, 0, 64, 64, 64, [], [], 64, 0, 0, 0, {}, 0, 0, 0, 0, 0)


def load_large(config: Config, files: ModelFiles, replica: int) -> Any:
    return FakeEngine(LARGE_ANSWER)


def load_small(config: Config, files: ModelFiles, replica: int) -> Any:
    return FakeEngine(1)


def load_nothing(config: Config, files: ModelFiles, replica: int) -> Any:
    raise RuntimeError("no model")
