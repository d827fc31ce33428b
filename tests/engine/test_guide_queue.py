"""Requests whose guide is being compiled, over a compiler that takes as long as the test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastserve.engine import guides
from fastserve.engine.guides import CompiledGuide
from fastserve.types import Guide, Outcome

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 5}


@pytest.fixture
def slow_compiler(fake_engine: Any, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(engine, event until which its compiler computes at the guide "slow")."""
    engine, done = fake_engine(49152, tokenizer=tokenizer_directory), threading.Event()
    compile_: Callable[[Guide], CompiledGuide] = engine._guide_queue._compiler._compile

    def compile_slowly(guide: Guide) -> CompiledGuide:
        if guide.regex == "slow":
            while not done.is_set():
                pass
        return compile_(guide)

    monkeypatch.setattr(engine._guide_queue._compiler, "_compile", compile_slowly)
    yield engine, done
    done.set()


def test_a_guide_that_compiles_has_its_slots(slow_compiler: Any, helpers: Any) -> None:
    engine, done = slow_compiler
    free = engine.stats().free_slots
    engine.add(helpers.make_add("a", [1], guide=Guide(regex="slow"), n=3))
    assert engine.stats().free_slots == free - 3
    assert engine.stats().received == 1
    done.set()
    helpers.run_until_idle(engine)
    assert engine.stats().free_slots == free


def test_a_guide_that_compiles_for_too_long_is_refused_and_delays_no_other(
    slow_compiler: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guides, "MAX_COMPILE_SECONDS", 0.05)
    engine, _ = slow_compiler
    engine.add(helpers.make_add("slow", [1], guide=Guide(regex="slow"), **GREEDY))
    helpers.assert_refused(
        helpers.run_until_idle(engine)["slow"], "it is too complex: compiling it takes more than"
    )
    monkeypatch.setattr(guides, "MAX_COMPILE_SECONDS", 60.0)
    engine.add(helpers.make_add("next", [1], guide=Guide(regex="a"), **GREEDY))
    assert helpers.run_until_idle(engine)["next"][-1].outcome is Outcome.STOP


def test_a_second_request_of_a_uid_whose_guide_compiles_fails_it(slow_compiler: Any, helpers: Any) -> None:
    engine, _ = slow_compiler
    for _ in range(2):
        engine.add(helpers.make_add("twice", [1], guide=Guide(regex="slow"), **GREEDY))
    (output,) = helpers.run_until_idle(engine)["twice"]
    assert output.outcome is Outcome.ERROR
