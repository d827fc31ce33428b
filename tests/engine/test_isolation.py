"""One request that cannot be computed fails alone; the others' texts are what they would have been."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.errors import ErrorCode
from fastserve.types import Outcome

POISON, NAN = 57, 58
"""Tokens that the requests beside never have: their bias keeps them away."""
HARMLESS = {POISON: -100.0, NAN: -100.0}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "logit_bias": HARMLESS}
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "logit_bias": HARMLESS}


def add_others(engine: Any, helpers: Any) -> None:
    for number in range(5):
        sampling = GREEDY if number % 2 else SEEDED
        engine.add(helpers.make_add(f"other {number}", [number, 5, 9, *range(number * 3)], **sampling))
    engine.add(helpers.make_add("two", [7, 8, 9], n=2, **SEEDED))


def texts_of(outputs: dict[str, Any], helpers: Any) -> dict[tuple[str, int], list[int]]:
    """The tokens of the harmless requests, all of which came to their end."""
    texts: dict[tuple[str, int], list[int]] = {}
    for uid, of_request in outputs.items():
        if uid.startswith("bad"):
            continue
        indices = {output.index for output in of_request}
        assert [output.outcome for output in of_request if output.outcome] == [Outcome.LENGTH] * len(indices)
        texts |= {(uid, index): helpers.tokens_of(of_request, index) for index in indices}
    return texts


@pytest.fixture
def expected(fake_engine: Any, helpers: Any) -> dict[tuple[str, int], list[int]]:
    engine = fake_engine()
    add_others(engine, helpers)
    return texts_of(helpers.run_until_idle(engine), helpers)


def assert_failed(outputs: list[Any], words: str, num_sequences: int = 1) -> None:
    """The client does not send what is INTERNAL again."""
    ended = [output for output in outputs if output.outcome is not None]
    assert len(ended) == num_sequences
    for output in ended:
        assert output.outcome is Outcome.ERROR
        assert output.failure.code == ErrorCode.INTERNAL.value
        assert words in output.failure.message


BAD: dict[str, tuple[list[int], dict[str, Any]]] = {
    "in the prompt": ([1, POISON, 2], {}),
    "at the end of the prompt": ([1, 2, POISON], {}),
    "in a late chunk": ([*range(50)] * 2 + [POISON, 4], {}),
    "while decoding": ([1, 2], {"logit_bias": {POISON: 100.0}, "temperature": 0.0}),
    "of two sequences": ([1, 2], {"n": 2, "logit_bias": {POISON: 100.0}, "temperature": 1.0}),
    "with logprobs of the prompt": ([1, POISON, 2], {"prompt_logprobs": 2, "logprobs": 2}),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_request_that_raises_fails_alone(fake_engine: Any, helpers: Any, expected: Any, kind: str) -> None:
    engine = fake_engine()
    engine.runner.poison = {POISON}
    prompt, sampling = BAD[kind]
    engine.add(helpers.make_add("bad", prompt, priority=1, **{"max_tokens": 8, **sampling}))
    add_others(engine, helpers)
    outputs = helpers.run_until_idle(engine)
    assert_failed(outputs["bad"], f"RuntimeError: token {POISON} is poison", sampling.get("n", 1))
    assert texts_of(outputs, helpers) == expected
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("token", [POISON, NAN], ids=["raises", "is not finite"])
def test_several_at_once(fake_engine: Any, helpers: Any, expected: Any, token: int) -> None:
    engine = fake_engine()
    engine.runner.poison, engine.runner.nan = {POISON}, {NAN}
    engine.add(helpers.make_add("bad 1", [1, token, 3], **GREEDY))
    add_others(engine, helpers)
    engine.add(helpers.make_add("bad 2", [4, token, 6, 7], **SEEDED))
    engine.add(helpers.make_add("bad 3", [4, token], **SEEDED))
    outputs = helpers.run_until_idle(engine)
    for uid in ("bad 1", "bad 2", "bad 3"):
        assert_failed(outputs[uid], "poison" if token == POISON else "not finite")
    assert texts_of(outputs, helpers) == expected


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_among_preempted_sequences(
    fake_engine: Any, helpers: Any, expected: Any, prefix_caching: bool
) -> None:
    engine = fake_engine(num_blocks=18, prefix_caching=prefix_caching)
    engine.runner.poison, engine.runner.nan = {POISON}, {NAN}
    engine.add(helpers.make_add("bad 1", [1, 2], **{**GREEDY, "logit_bias": {POISON: 100.0}}))
    add_others(engine, helpers)
    engine.add(helpers.make_add("bad 2", [1, 2, *range(20), NAN], priority=2, **GREEDY))
    outputs = helpers.run_until_idle(engine)
    assert engine.stats().preemptions_total > 0
    assert_failed(outputs["bad 1"], "poison")
    assert_failed(outputs["bad 2"], "not finite")
    assert texts_of(outputs, helpers) == expected
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"logprobs": 3}, {"prompt_logprobs": 3}])
@pytest.mark.parametrize("prompt", [[1, NAN, 2, 3], [1, 2, NAN]], ids=["early", "last"])
def test_numbers_that_are_not_finite_fail_their_request(
    fake_engine: Any, helpers: Any, expected: Any, prompt: list[int], sampling: dict[str, Any]
) -> None:
    engine = fake_engine()
    engine.runner.nan = {NAN}
    for time in ("first", "again, with the cache warm"):
        engine.add(helpers.make_add(f"bad {time}", prompt, **sampling))
        add_others(engine, helpers)
        outputs = helpers.run_until_idle(engine)
        assert_failed(outputs[f"bad {time}"], f"after token {prompt.index(NAN)}")
        assert not helpers.tokens_of(outputs[f"bad {time}"])
        assert texts_of(outputs, helpers) == expected


def test_an_error_of_every_request_ends_the_engine(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine()
    add_others(engine, helpers)
    engine.step()
    engine.runner.is_lost = True
    runs = engine.runner.num_runs
    with pytest.raises(RuntimeError, match="the device is lost"):
        engine.step()
    assert engine.runner.num_runs == runs + 1


def test_an_error_of_large_batches_fails_nobody(
    fake_engine: Any, helpers: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as when memory for a batch's activations is short."""
    engine = fake_engine()
    run = engine.runner.run

    def run_few(plan: Any) -> Any:
        if len(plan.scheduled) > 3:
            raise MemoryError("too large a batch")
        return run(plan)

    monkeypatch.setattr(engine.runner, "run", run_few)
    add_others(engine, helpers)
    assert texts_of(helpers.run_until_idle(engine), helpers) == expected


def test_a_token_that_cannot_be_booked_fails_its_request(
    fake_engine: Any, helpers: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fake_engine()
    start = engine._sampler.start

    def start_unbookable(sequence: Any, guide: Any) -> Any:
        state = start(sequence, guide)
        if sequence.request.uid == "bad":
            state.append = None
        return state

    monkeypatch.setattr(engine._sampler, "start", start_unbookable)
    engine.add(helpers.make_add("bad", [1, 2, 3], **GREEDY))
    add_others(engine, helpers)
    outputs = helpers.run_until_idle(engine)
    assert_failed(outputs["bad"], "TypeError")
    assert texts_of(outputs, helpers) == expected
