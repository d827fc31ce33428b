"""Guides that compile, that do not, and that leave nothing, over a fake runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from fastserve.engine.guides import CompiledGuide, GuideCache, GuideCompiler
from fastserve.errors import ErrorCode, RequestError
from fastserve.types import Guide, Outcome

NO_CHARACTER = r"[^\x00-\U0010FFFF]"
"""A regex that compiles and matches nothing."""
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 5}


@pytest.mark.parametrize("missing", [1, 1000])
def test_a_tokenizer_of_more_tokens_than_the_model_can_guide_it(
    fake_engine: Any, helpers: Any, tokenizer_directory: Path, missing: int
) -> None:
    vocab_size = 49152 - missing
    engine = fake_engine(vocab_size, tokenizer=tokenizer_directory, eos_token_ids=(2, 49151))
    engine.add(helpers.make_add("a", [1], guide=Guide(choice=["yes", "no"]), **GREEDY))
    (*_, last) = helpers.run_until_idle(engine)["a"]
    assert last.outcome is Outcome.STOP


def test_a_guide_that_leaves_nothing_says_so(
    fake_engine: Any, helpers: Any, tokenizer_directory: Path
) -> None:
    """The only token that it allows next is one that the model does not have."""
    engine = fake_engine(100, tokenizer=tokenizer_directory)
    engine.add(helpers.make_add("a", [1], guide=Guide(regex="é"), **GREEDY))
    engine.add(helpers.make_add("drawn", [1], guide=Guide(regex="é"), temperature=1.0))
    engine.add(helpers.make_add("never", [1], guide=Guide(regex=NO_CHARACTER), **GREEDY))
    engine.add(helpers.make_add("good", [1], **GREEDY))
    outputs = helpers.run_until_idle(engine)
    for uid in ("a", "drawn"):
        helpers.assert_refused(
            outputs[uid], "`structured_outputs`: after 0 tokens no token of the model is left"
        )
    helpers.assert_refused(outputs["never"], "`structured_outputs`")
    assert "<" not in outputs["never"][0].failure.message
    assert len(helpers.tokens_of(outputs["good"])) == 5


@pytest.mark.parametrize("guide", [Guide(json="{"), Guide(regex="("), Guide(grammar="start: nothing")])
def test_a_guide_that_does_not_compile_is_refused(
    fake_engine: Any, helpers: Any, tokenizer_directory: Path, guide: Guide
) -> None:
    engine = fake_engine(49152, tokenizer=tokenizer_directory)
    engine.add(helpers.make_add("bad", [1], guide=guide, **GREEDY))
    engine.add(helpers.make_add("good", [1], **GREEDY))
    outputs = helpers.run_until_idle(engine)
    helpers.assert_refused(outputs["bad"], "`structured_outputs`: it does not compile")
    assert len(helpers.tokens_of(outputs["good"])) == 5


def test_without_a_tokenizer_only_guided_requests_fail(fake_engine: Any, helpers: Any) -> None:
    engine = fake_engine()
    engine.add(helpers.make_add("bad", [1], guide=Guide(regex="a"), **GREEDY))
    engine.add(helpers.make_add("good", [1], **GREEDY))
    outputs = helpers.run_until_idle(engine)
    assert outputs["bad"][0].failure.code == ErrorCode.INTERNAL.value
    assert "tokenizer.json" in outputs["bad"][0].failure.message
    assert len(helpers.tokens_of(outputs["good"])) == 5


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
