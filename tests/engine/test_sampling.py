"""Sampling parameters, seeds and endings, on the real model."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.types import Guide, Outcome

PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"


@pytest.fixture(scope="module")
def engine(make_engine: Any) -> Any:
    return make_engine(dtype="bfloat16", max_num_seqs=32)


def generate(engine: Any, helpers: Any, count: int = 1, **sampling: Any) -> list[list[int]]:
    for index in range(count):
        engine.add(helpers.make_add(str(index), PROMPT, **{"max_tokens": 32, **sampling}))
    outputs = helpers.run_until_idle(engine)
    return [helpers.tokens_of(outputs[str(index)]) for index in range(count)]


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(engine: Any, helpers: Any) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 42, "max_tokens": 64, "ignore_eos": True}
    engine.add(helpers.make_add("alone", PROMPT, **sampling))
    alone = helpers.tokens_of(helpers.run_until_idle(engine)["alone"])
    for index in range(15):
        prompt = [1000 + index, *range(2000, 2000 + 31 * index)]
        engine.add(
            helpers.make_add(f"other {index}", prompt, temperature=1.0, max_tokens=64, ignore_eos=True)
        )
    engine.add(helpers.make_add("in a batch", PROMPT, **sampling))
    assert helpers.tokens_of(helpers.run_until_idle(engine)["in a batch"]) == alone


def test_without_a_seed_texts_differ(engine: Any, helpers: Any) -> None:
    first, second = generate(engine, helpers, count=2, temperature=1.5, ignore_eos=True)
    assert first != second


def test_sequences_of_one_request_differ_and_repeat(engine: Any, helpers: Any) -> None:
    def texts() -> list[list[int]]:
        engine.add(
            helpers.make_add("n", PROMPT, n=4, seed=5, temperature=1.0, max_tokens=16, ignore_eos=True)
        )
        outputs = helpers.run_until_idle(engine)["n"]
        return [helpers.tokens_of(outputs, index) for index in range(4)]

    once = texts()
    assert len({tuple(text) for text in once}) == 4
    assert texts() == once


def test_banned_and_wanted_tokens(engine: Any, helpers: Any) -> None:
    (greedy,) = generate(engine, helpers, temperature=0.0, max_tokens=1)
    (other,) = generate(engine, helpers, temperature=0.0, max_tokens=1, logit_bias={greedy[0]: -100.0})
    assert other != greedy
    (forced,) = generate(
        engine, helpers, temperature=0.0, max_tokens=3, logit_bias={333: 100.0}, ignore_eos=True
    )
    assert forced == [333, 333, 333]


def test_penalties_push_repetition_away(engine: Any, helpers: Any) -> None:
    repeated: dict[str, Any] = {
        "temperature": 0.0,
        "logit_bias": {333: 20.0},
        "ignore_eos": True,
        "max_tokens": 16,
    }
    (plain,) = generate(engine, helpers, **repeated)
    (frequency,) = generate(engine, helpers, frequency_penalty=2.0, **repeated)
    (repetition,) = generate(engine, helpers, repetition_penalty=10.0, **repeated)
    assert plain.count(333) > frequency.count(333) >= 1
    assert repetition.count(333) < plain.count(333)


def test_min_tokens_holds_the_end_back(engine: Any, helpers: Any) -> None:
    ends: dict[str, Any] = {"temperature": 0.0, "stop_token_ids": [333], "logit_bias": {333: 100.0}}
    (short,) = generate(engine, helpers, **ends)
    (long,) = generate(engine, helpers, min_tokens=5, **ends)
    assert short == [333]
    assert len(long) == 6
    assert long.index(333) == 5


def test_outcomes(engine: Any, helpers: Any) -> None:
    engine.add(helpers.make_add("stop", PROMPT, stop_token_ids=[7042], temperature=0.0))
    engine.add(helpers.make_add("length", PROMPT, max_tokens=2, temperature=0.0))
    engine.add(helpers.make_add("too long", [5] * engine.max_model_len, max_tokens=2))
    outputs = helpers.run_until_idle(engine)
    assert outputs["stop"][-1].outcome is Outcome.STOP
    assert outputs["length"][-1].outcome is Outcome.LENGTH
    assert outputs["too long"][-1].outcome is Outcome.ERROR
    assert "prompt" in outputs["too long"][-1].failure.message


def test_a_guide_that_fails_in_the_engine_fails_its_request_only(engine: Any, helpers: Any) -> None:
    engine.add(helpers.make_add("bad", PROMPT, guide=Guide(regex="(")))
    engine.add(helpers.make_add("good", PROMPT, max_tokens=4, temperature=0.0))
    outputs = helpers.run_until_idle(engine)
    assert outputs["bad"][-1].outcome is Outcome.ERROR
    assert len(helpers.tokens_of(outputs["good"])) == 4


def test_cancelled_sequences_leave_no_blocks(engine: Any, helpers: Any) -> None:
    engine.add(helpers.make_add("a", PROMPT, max_tokens=1000, ignore_eos=True, n=2))
    for _ in range(5):
        engine.step()
    assert engine.stats().kv_blocks_used > 0
    engine.cancel("a", Outcome.CANCELLED)
    outputs = helpers.run_until_idle(engine)["a"]
    assert [output.outcome for output in outputs] == [Outcome.CANCELLED] * 2
    assert engine.stats().kv_blocks_used == 0
