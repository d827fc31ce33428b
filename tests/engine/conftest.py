"""The default model as our engine loads it, an engine over a fake runner, and requests for both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.engine.engine import Engine
from fastserve.engine.engine_loader import load_engine
from fastserve.errors import ErrorCode
from fastserve.types import Add, Outcome, OutputOptions, Request, SamplingParams, SequenceOutput

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def make_engine(default_model: ModelFiles) -> MakeEngine:
    """An engine with these settings; of fp32 weights unless told otherwise."""

    def make(**settings: Any) -> Engine:
        return load_engine(
            Config(**{"dtype": "float32", "kv_cache_bytes": 1 << 28, **settings}), default_model
        )

    return make


@pytest.fixture
def fake_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeEngine:
    """An engine over a `FakeRunner`, which is its `runner`. It takes microseconds a token."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from fake_runner import make_fake_engine

    def make(vocab_size: int = 60, **settings: Any) -> Engine:
        return make_fake_engine(vocab_size, **{"tokenizer": tmp_path, **settings})

    return make


def make_request(
    uid: str,
    prompt_token_ids: list[int],
    priority: int = 0,
    bad_words: Sequence[list[int]] = (),
    **sampling: Any,
) -> Request:
    return Request(
        uid=uid,
        request_id=uid,
        prompt="",
        prompt_token_ids=prompt_token_ids,
        sampling=SamplingParams(**sampling),
        output=OutputOptions(),
        priority=priority,
        tenant="",
        arrival=time.monotonic(),
        deadline=None,
        bad_words_token_ids=list(bad_words),
    )


def make_add(*arguments: Any, **sampling: Any) -> Add:
    """The message that takes a request of `make_request` in."""
    return Add(make_request(*arguments, **sampling))


def run_until_idle(engine: Engine) -> dict[str, list[SequenceOutput]]:
    """Steps the engine until it has no work; all outputs by request."""
    outputs: dict[str, list[SequenceOutput]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            outputs.setdefault(output.uid, []).append(output)
    return outputs


def tokens_of(outputs: list[SequenceOutput], index: int = 0) -> list[int]:
    return [token for output in outputs if output.index == index for token in output.token_ids]


def assert_refused(outputs: list[SequenceOutput], words: str) -> None:
    """All that came of a request is an error that says this."""
    (output,) = outputs
    assert output.outcome is Outcome.ERROR
    assert output.failure is not None
    assert output.failure.code == ErrorCode.INVALID_ARG.value
    assert words in output.failure.message


class FreeRows:
    """Step times by which every guess is worth its row."""

    per_row = 0.0

    def of(self, num_rows: int) -> float:
        return 1.0

    def observe(self, num_rows: int, seconds: float) -> None:
        pass


def always_speculate(engine: Engine) -> Engine:
    """Whatever its steps take."""
    engine._speculator._step_seconds = FreeRows()  # type: ignore[assignment]
    return engine


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The functions of this file."""

    class Helpers:
        make_request = staticmethod(make_request)
        make_add = staticmethod(make_add)
        run_until_idle = staticmethod(run_until_idle)
        tokens_of = staticmethod(tokens_of)
        assert_refused = staticmethod(assert_refused)
        always_speculate = staticmethod(always_speculate)

    return Helpers
