"""The engine's own books and guards, over a fake runner."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.scheduling.block_pool import BlockPoolError
from fastserve.scheduling.iteration_scheduler import SchedulerError
from fastserve.types import Outcome, view_of

VOCAB = 60
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 5}


@pytest.mark.parametrize(
    ("field", "prompt", "sampling"),
    [
        ("prompt", [1, VOCAB], {}),
        ("prompt", [1, -1], {}),
        ("prompt", [], {}),
        ("logit_bias", [1], {"logit_bias": {VOCAB: 1.0}}),
        ("stop_token_ids", [1], {"stop_token_ids": [VOCAB], "min_tokens": 2}),
        ("bad_words", [1], {"bad_words": [[3], [4, VOCAB]]}),
    ],
)
def test_ids_that_the_model_does_not_have_are_refused_by_name(
    fake_engine: Any, helpers: Any, field: str, prompt: list[int], sampling: dict[str, Any]
) -> None:
    engine = fake_engine(VOCAB)
    engine.add(helpers.make_add("good", [1, 2], **GREEDY))
    engine.add(helpers.make_add("bad", prompt, **sampling))
    outputs = helpers.run_until_idle(engine)
    helpers.assert_refused(outputs["bad"], field)
    assert len(helpers.tokens_of(outputs["good"])) == 5


def test_a_second_request_of_a_uid_fails_with_the_first_and_no_other(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB)
    for uid in ("good", "twice"):
        engine.add(helpers.make_add(uid, [1, 2], n=2, temperature=1.0, max_tokens=5))
    first = engine.step().outputs
    engine.add(helpers.make_add("twice", [3], **GREEDY))
    outputs = helpers.run_until_idle(engine)
    assert [each.index for each in outputs["twice"]] == [0, 1]
    assert {each.outcome for each in outputs["twice"]} == {Outcome.ERROR}
    assert "twice" in outputs["twice"][0].failure.message
    for index in range(2):
        good = [each for each in first if each.uid == "good"] + outputs["good"]
        assert len(helpers.tokens_of(good, index)) == 5
    engine.add(helpers.make_add("twice", [3], **GREEDY))
    assert len(helpers.tokens_of(helpers.run_until_idle(engine)["twice"])) == 5


def test_an_end_token_that_the_model_does_not_have_never_comes(fake_engine: Any, helpers: Any) -> None:
    """A tokenizer of more tokens than the model may have one."""
    engine = fake_engine(VOCAB, eos_token_ids=(VOCAB,))
    engine.add(helpers.make_add("a", [1, 2], min_tokens=3, **GREEDY))
    assert len(helpers.tokens_of(helpers.run_until_idle(engine)["a"])) == 5


def test_more_logprobs_than_the_model_has_tokens(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(10)
    engine.add(helpers.make_add("a", [1, 2], logprobs=20, prompt_logprobs=20, **GREEDY))
    first, *_ = helpers.run_until_idle(engine)["a"]
    assert len(first.logprobs[0]) == len(first.prompt_logprobs[1]) == 11


def test_parameters_that_leave_no_token_fail_their_request(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB)
    every = [[token] for token in range(VOCAB)]
    engine.add(helpers.make_add("words", [1], bad_words=every, **GREEDY))
    engine.add(helpers.make_add("drawn", [1], bad_words=every, temperature=1.0))
    engine.add(helpers.make_add("ends", [1], min_tokens=3, stop_token_ids=list(range(VOCAB)), **GREEDY))
    engine.add(helpers.make_add("good", [1, 2], **GREEDY))
    outputs = helpers.run_until_idle(engine)
    helpers.assert_refused(outputs["words"], "`bad_words`: after 0 tokens no token of the model is left")
    helpers.assert_refused(outputs["drawn"], "`bad_words`: after 0 tokens no token of the model is left")
    helpers.assert_refused(outputs["ends"], "`min_tokens`: after 0 tokens no token of the model is left")
    assert len(helpers.tokens_of(outputs["good"])) == 5


def test_the_books_are_checked_when_the_engine_idles(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB)
    engine.add(helpers.make_add("a", [1, 2], **GREEDY))
    helpers.run_until_idle(engine)
    engine.scheduler.pool.allocate(1)  # a block that nobody will give back
    engine.add(helpers.make_add("b", [1, 2], **GREEDY))
    with pytest.raises(BlockPoolError):
        helpers.run_until_idle(engine)


def test_a_sequence_that_is_left_over_is_noticed(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB)
    engine.add(helpers.make_add("a", [1, 2], **GREEDY))
    engine.step()
    engine.scheduler._waiting.push(
        "a sequence that nobody knows", view_of(helpers.make_request("", [1])), 0.0
    )
    engine.cancel("a", Outcome.CANCELLED)
    with pytest.raises(SchedulerError, match="1 in more than they may"):
        helpers.run_until_idle(engine)


def test_the_last_tokens_leave_before_the_books_are_checked(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB)
    engine.add(helpers.make_add("a", [1, 2], **GREEDY))
    engine.scheduler.pool.allocate(1)
    outputs = [output for _ in range(5) for output in engine.step().outputs]
    assert outputs[-1].outcome is Outcome.LENGTH
    with pytest.raises(BlockPoolError):
        engine.step()


def test_a_sequence_that_has_outgrown_the_cache_fails_alone(
    fake_engine: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fake_engine(VOCAB, num_blocks=4, block_size=4)
    monkeypatch.setattr(engine, "max_model_len", 1000)
    engine.add(helpers.make_add("long", [1, 2], temperature=0.0, max_tokens=100))
    engine.add(helpers.make_add("short", [1, 2], **GREEDY))
    outputs = helpers.run_until_idle(engine)
    assert "the cache has 4" in outputs["long"][-1].failure.message
    assert len(helpers.tokens_of(outputs["short"])) == 5


def test_it_gives_way_behind_first_tokens_where_it_takes_all_cores(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB, takes_all_cores=True)
    engine.add(helpers.make_add("a", [1, 2], **GREEDY))
    engine.step()
    assert engine.gives_way
    engine.step()
    assert not engine.gives_way
    engine.add(helpers.make_add("b", [3], **GREEDY))
    engine.step()
    assert engine.gives_way


def test_it_never_gives_way_where_cores_are_free(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB)
    engine.add(helpers.make_add("a", [1, 2], **GREEDY))
    engine.step()
    assert not engine.gives_way
