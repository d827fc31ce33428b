"""Guides: what compiles matches what it says, and what does not is refused by name, quickly."""

from __future__ import annotations

import pytest
from fastserve.errors import RequestError
from fastserve.text.guide import MAX_GUIDE_CHARACTERS, grammar_of, validate_guide
from fastserve.text.tokenizer import Tokenizer
from fastserve.types import Guide
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    return LLTokenizer(tokenizer.backend.to_str(), eos_token=tokenizer.eos_token_ids[0])


def accepts(vocabulary: LLTokenizer, guide: Guide, text: str) -> bool:
    """Whether `text`, and the end after it, is allowed by the guide."""
    matcher = LLMatcher(vocabulary, grammar_of(guide))
    assert not matcher.is_error(), matcher.get_error()
    tokens = vocabulary.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("guide", "yes", "no"),
    [
        (
            Guide(json='{"type": "object", "properties": {"a": {"type": "integer"}}}'),
            '{"a": 1}',
            '{"a": "x"}',
        ),
        (Guide(regex="[0-9]{3}"), "123", "12"),
        (Guide(choice=["yes", "no"]), "no", "maybe"),
        (Guide(grammar='start: "(" start ")" | "x"'), "((x))", "((x)"),
    ],
)
def test_guides_of_each_kind(vocabulary: LLTokenizer, guide: Guide, yes: str, no: str) -> None:
    validate_guide(guide, "guided_decoding")
    assert accepts(vocabulary, guide, yes)
    assert not accepts(vocabulary, guide, no)


def test_a_choice_is_literal(vocabulary: LLTokenizer) -> None:
    # llguidance tokenises at U+FF itself; the rest of Unicode is fair.
    texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)

    @settings(max_examples=200, deadline=None)
    @given(choices=st.lists(texts, min_size=1, max_size=4), other=texts)
    def check(choices: list[str], other: str) -> None:
        guide = Guide(choice=choices)
        validate_guide(guide, "choice")
        assert all(accepts(vocabulary, guide, choice) for choice in choices)
        assert accepts(vocabulary, guide, other) == (other in choices)

    check()


@pytest.mark.parametrize(
    "guide",
    [
        Guide(json="{"),
        Guide(json='{"type": "nonsense"}'),
        Guide(json='{"$ref": "http://example.com/schema.json"}'),
        Guide(json='{"items":' * 5000 + "{}" + "}" * 5000),
        Guide(regex="("),
        Guide(regex=r"(a)\1"),
        Guide(regex="(" * 50000 + "a" + ")" * 50000),
        Guide(grammar=""),
        Guide(grammar="start: undefined"),
        Guide(grammar="start: " + "(" * 10000 + '"a"' + ")" * 10000),
        Guide(choice=["x" * (MAX_GUIDE_CHARACTERS + 1)]),
    ],
    ids=lambda guide: str(guide)[:40],
)
def test_guides_that_do_not_compile(guide: Guide) -> None:
    with pytest.raises(RequestError, match=r"^`guided_decoding`: ") as raised:
        validate_guide(guide, "guided_decoding")
    assert len(str(raised.value)) < 1000
