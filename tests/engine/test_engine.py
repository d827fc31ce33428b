"""The engine's own books and guards, over a fake runner."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from fastserve.engine import guides
from fastserve.engine.guides import CompiledGuide, GuideCache, GuideCompiler
from fastserve.errors import ErrorCode, RequestError
from fastserve.scheduling.block_pool import BlockPoolError
from fastserve.scheduling.iteration_scheduler import SchedulerError
from fastserve.types import Guide, Outcome

VOCAB = 60
NO_CHARACTER = r"[^\x00-\U0010FFFF]"
"""A regex that compiles and matches nothing."""
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 5}


def assert_refused(outputs: list[Any], words: str) -> None:
    (output,) = outputs
    assert output.outcome is Outcome.ERROR
    assert output.failure.code == ErrorCode.INVALID_ARG.value
    assert words in output.failure.message


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
    engine.add(helpers.make_request("good", [1, 2], **GREEDY))
    engine.add(helpers.make_request("bad", prompt, **sampling))
    outputs = helpers.run_until_idle(engine)
    assert_refused(outputs["bad"], field)
    assert len(helpers.tokens_of(outputs["good"])) == 5


def test_a_second_request_of_a_uid_fails_with_the_first_and_no_other(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB)
    for uid in ("good", "twice"):
        engine.add(helpers.make_request(uid, [1, 2], n=2, temperature=1.0, max_tokens=5))
    first = engine.step().outputs
    engine.add(helpers.make_request("twice", [3], **GREEDY))
    outputs = helpers.run_until_idle(engine)
    assert [each.index for each in outputs["twice"]] == [0, 1]
    assert {each.outcome for each in outputs["twice"]} == {Outcome.ERROR}
    assert "twice" in outputs["twice"][0].failure.message
    for index in range(2):
        good = [each for each in first if each.uid == "good"] + outputs["good"]
        assert len(helpers.tokens_of(good, index)) == 5
    engine.add(helpers.make_request("twice", [3], **GREEDY))
    assert len(helpers.tokens_of(helpers.run_until_idle(engine)["twice"])) == 5


def test_a_second_request_of_a_uid_whose_guide_compiles_fails_it(slow_compiler: Any, helpers: Any) -> None:
    engine, _ = slow_compiler
    for _ in range(2):
        engine.add(helpers.make_request("twice", [1], guide=Guide(regex="slow"), **GREEDY))
    (output,) = helpers.run_until_idle(engine)["twice"]
    assert output.outcome is Outcome.ERROR


def test_an_end_token_that_the_model_does_not_have_never_comes(fake_engine: Any, helpers: Any) -> None:
    """A tokenizer of more tokens than the model may have one."""
    engine = fake_engine(VOCAB, eos_token_ids=(VOCAB,))
    engine.add(helpers.make_request("a", [1, 2], min_tokens=3, **GREEDY))
    assert len(helpers.tokens_of(helpers.run_until_idle(engine)["a"])) == 5


def test_more_logprobs_than_the_model_has_tokens(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(10)
    engine.add(helpers.make_request("a", [1, 2], logprobs=20, prompt_logprobs=20, **GREEDY))
    first, *_ = helpers.run_until_idle(engine)["a"]
    assert len(first.logprobs[0]) == len(first.prompt_logprobs[1]) == 11


def test_parameters_that_leave_no_token_fail_their_request(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB)
    every = [[token] for token in range(VOCAB)]
    engine.add(helpers.make_request("words", [1], bad_words=every, **GREEDY))
    engine.add(helpers.make_request("drawn", [1], bad_words=every, temperature=1.0))
    engine.add(helpers.make_request("ends", [1], min_tokens=3, stop_token_ids=list(range(VOCAB)), **GREEDY))
    engine.add(helpers.make_request("good", [1, 2], **GREEDY))
    outputs = helpers.run_until_idle(engine)
    assert_refused(outputs["words"], "`bad_words`: after 0 tokens no token of the model is left")
    assert_refused(outputs["drawn"], "`bad_words`: after 0 tokens no token of the model is left")
    assert_refused(outputs["ends"], "`min_tokens`: after 0 tokens no token of the model is left")
    assert len(helpers.tokens_of(outputs["good"])) == 5


# --- guides


@pytest.mark.parametrize("missing", [1, 1000])
def test_a_tokenizer_of_more_tokens_than_the_model_can_guide_it(
    fake_engine: Any, helpers: Any, tokenizer_directory: Path, missing: int
) -> None:
    vocab_size = 49152 - missing
    engine = fake_engine(vocab_size, tokenizer=tokenizer_directory, eos_token_ids=(2, 49151))
    engine.add(helpers.make_request("a", [1], guide=Guide(choice=["yes", "no"]), **GREEDY))
    (*_, last) = helpers.run_until_idle(engine)["a"]
    assert last.outcome is Outcome.STOP


def test_a_guide_that_leaves_nothing_says_so(
    fake_engine: Any, helpers: Any, tokenizer_directory: Path
) -> None:
    """The only token that it allows next is one that the model does not have."""
    engine = fake_engine(100, tokenizer=tokenizer_directory)
    engine.add(helpers.make_request("a", [1], guide=Guide(regex="é"), **GREEDY))
    engine.add(helpers.make_request("drawn", [1], guide=Guide(regex="é"), temperature=1.0))
    engine.add(helpers.make_request("never", [1], guide=Guide(regex=NO_CHARACTER), **GREEDY))
    engine.add(helpers.make_request("good", [1], **GREEDY))
    outputs = helpers.run_until_idle(engine)
    for uid in ("a", "drawn"):
        assert_refused(outputs[uid], "`structured_outputs`: after 0 tokens no token of the model is left")
    assert_refused(outputs["never"], "`structured_outputs`")
    assert "<" not in outputs["never"][0].failure.message
    assert len(helpers.tokens_of(outputs["good"])) == 5


@pytest.mark.parametrize("guide", [Guide(json="{"), Guide(regex="("), Guide(grammar="start: nothing")])
def test_a_guide_that_does_not_compile_is_refused(
    fake_engine: Any, helpers: Any, tokenizer_directory: Path, guide: Guide
) -> None:
    engine = fake_engine(49152, tokenizer=tokenizer_directory)
    engine.add(helpers.make_request("bad", [1], guide=guide, **GREEDY))
    engine.add(helpers.make_request("good", [1], **GREEDY))
    outputs = helpers.run_until_idle(engine)
    assert_refused(outputs["bad"], "`structured_outputs`: it does not compile")
    assert len(helpers.tokens_of(outputs["good"])) == 5


def test_without_a_tokenizer_only_guided_requests_fail(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB)
    engine.add(helpers.make_request("bad", [1], guide=Guide(regex="a"), **GREEDY))
    engine.add(helpers.make_request("good", [1], **GREEDY))
    outputs = helpers.run_until_idle(engine)
    assert outputs["bad"][0].failure.code == ErrorCode.INTERNAL.value
    assert "tokenizer.json" in outputs["bad"][0].failure.message
    assert len(helpers.tokens_of(outputs["good"])) == 5


@pytest.fixture
def slow_compiler(fake_engine: Any, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(engine, event until which its compiler computes at the guide "slow")."""
    engine, done = fake_engine(49152, tokenizer=tokenizer_directory), threading.Event()
    compile_: Callable[[Guide], CompiledGuide] = engine._guides._compile

    def compile_slowly(guide: Guide) -> CompiledGuide:
        if guide.regex == "slow":
            while not done.is_set():
                pass
        return compile_(guide)

    monkeypatch.setattr(engine._guides, "_compile", compile_slowly)
    yield engine, done
    done.set()


def test_a_guide_that_compiles_has_its_slots(slow_compiler: Any, helpers: Any) -> None:
    engine, done = slow_compiler
    free = engine.stats().free_slots
    engine.add(helpers.make_request("a", [1], guide=Guide(regex="slow"), n=3))
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
    engine.add(helpers.make_request("slow", [1], guide=Guide(regex="slow"), **GREEDY))
    assert_refused(helpers.run_until_idle(engine)["slow"], "it is too complex: compiling it takes more than")
    monkeypatch.setattr(guides, "MAX_COMPILE_SECONDS", 60.0)
    engine.add(helpers.make_request("next", [1], guide=Guide(regex="a"), **GREEDY))
    assert helpers.run_until_idle(engine)["next"][-1].outcome is Outcome.STOP


def test_compiled_guides_are_kept_up_to_a_size() -> None:
    cache, nothing = GuideCache(max_bytes=100), cast(Any, None)
    made = {
        name: CompiledGuide(nothing, 0, size) for name, size in (("a", 40), ("b", 40), ("c", 40), ("d", 101))
    }
    for name in ("a", "b"):
        cache.put(name, made[name])
    assert cache.get("a") is made["a"]
    for name in ("c", "d", "c"):
        cache.put(name, made[name])
    assert [cache.get(name) is not None for name in "abcd"] == [True, False, True, False]
    assert cache.num_bytes == 80


def test_a_guide_is_compiled_once(tokenizer_directory: Path) -> None:
    compiler = GuideCompiler(tokenizer_directory, [2], 49152)
    first, second = (compiler.compile(Guide(regex="[a-z]+")).result(60) for _ in range(2))
    assert first is second
    with pytest.raises(RequestError, match="does not compile"):
        compiler.compile(Guide(regex="(")).result(60)


# --- books


def test_the_books_are_checked_when_the_engine_idles(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB)
    engine.add(helpers.make_request("a", [1, 2], **GREEDY))
    helpers.run_until_idle(engine)
    engine._scheduler.pool.allocate(1)  # a block that nobody will give back
    engine.add(helpers.make_request("b", [1, 2], **GREEDY))
    with pytest.raises(BlockPoolError):
        helpers.run_until_idle(engine)


def test_a_sequence_that_is_left_over_is_noticed(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB)
    engine.add(helpers.make_request("a", [1, 2], **GREEDY))
    engine.step()
    engine._scheduler._waiting.push("a sequence that nobody knows", uid="", key=0.0, arrival=0.0)
    engine.cancel("a", Outcome.CANCELLED)
    with pytest.raises(SchedulerError, match="1 in more than they may"):
        helpers.run_until_idle(engine)


def test_the_last_tokens_leave_before_the_books_are_checked(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine(VOCAB)
    engine.add(helpers.make_request("a", [1, 2], **GREEDY))
    engine._scheduler.pool.allocate(1)
    outputs = [output for _ in range(5) for output in engine.step().outputs]
    assert outputs[-1].outcome is Outcome.LENGTH
    with pytest.raises(BlockPoolError):
        engine.step()


def test_a_sequence_that_has_outgrown_the_cache_fails_alone(
    fake_engine: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fake_engine(VOCAB, num_blocks=4, block_size=4)
    monkeypatch.setattr(engine, "max_model_len", 1000)
    engine.add(helpers.make_request("long", [1, 2], temperature=0.0, max_tokens=100))
    engine.add(helpers.make_request("short", [1, 2], **GREEDY))
    outputs = helpers.run_until_idle(engine)
    assert "the cache has 4" in outputs["long"][-1].failure.message
    assert len(helpers.tokens_of(outputs["short"])) == 5
