"""The default model as our engine loads it, and requests for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from fastserve.config import Config
from fastserve.engine.engine import Engine
from fastserve.engine.loading import load_engine
from fastserve.model_files import ModelFiles
from fastserve.types import OutputOptions, Request, SamplingParams, SequenceOutput

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def make_engine(default_model: ModelFiles) -> MakeEngine:
    """An engine with these settings; of fp32 weights unless told otherwise."""

    def make(**settings: Any) -> Engine:
        return load_engine(
            Config(**{"dtype": "float32", "kv_cache_bytes": 1 << 28, **settings}), default_model
        )

    return make


def make_request(uid: str, prompt_token_ids: list[int], priority: int = 0, **sampling: Any) -> Request:
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
    )


def run_until_idle(engine: Engine) -> dict[str, list[SequenceOutput]]:
    """Steps the engine until it has no work; all outputs by request."""
    outputs: dict[str, list[SequenceOutput]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            outputs.setdefault(output.uid, []).append(output)
    return outputs


def tokens_of(outputs: list[SequenceOutput], index: int = 0) -> list[int]:
    return [token for output in outputs if output.index == index for token in output.token_ids]


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The functions of this file."""

    class Helpers:
        make_request = staticmethod(make_request)
        run_until_idle = staticmethod(run_until_idle)
        tokens_of = staticmethod(tokens_of)

    return Helpers
