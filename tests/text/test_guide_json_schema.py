"""Schemas: what restricts nothing does no harm, and what the compiler cannot enforce is refused."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from fastserve.errors import RequestError
from fastserve.text.guide import ENFORCED_FORMATS, grammar_of, parse_guide, without_annotations
from fastserve.text.guide_validator import GuideValidator
from fastserve.text.tokenizer import Tokenizer
from fastserve.text.validation import Vocabulary

VOCABULARY = Vocabulary(1000, 1000)


@pytest.fixture(scope="module")
def validator(tokenizer: Tokenizer) -> GuideValidator:
    return GuideValidator(tokenizer)


def accepts(tokenizer: Tokenizer, validator: GuideValidator, schema: Any, text: str) -> bool:
    """Whether `text` is allowed under a schema that a client sent."""
    field, guide = parse_guide({"structured_outputs": {"json": schema}}, VOCABULARY)
    assert guide is not None
    validator.validate(guide, field)
    vocabulary = LLTokenizer(tokenizer.backend.to_str(), eos_token=tokenizer.eos_token_ids)
    matcher = LLMatcher(vocabulary, grammar_of(guide))
    tokens = vocabulary.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    "schema",
    [
        *(
            {"type": "string", "format": name}
            for name in ("uri-reference", "password", "binary", "byte", "json-pointer", "regex", "color")
        ),
        {"type": ["string", "null"], "format": "iri"},
        {"format": "int32"},
        {"type": "string", "title": "T", "description": "D", "default": 1, "examples": [1], "x-of-mine": 1},
        {"type": "array", "uniqueItems": False},
        {"type": "object", "unevaluatedProperties": True, "propertyNames": {}, "dependentRequired": {}},
    ],
    ids=str,
)
def test_what_restricts_nothing_is_accepted(
    tokenizer: Tokenizer, validator: GuideValidator, schema: dict[str, Any]
) -> None:
    text = {"array": "[1, 1]", "object": '{"a": 1}'}.get(str(schema.get("type")), '"a b"')
    assert accepts(tokenizer, validator, schema, text)


@pytest.mark.parametrize("name", sorted(ENFORCED_FORMATS))
def test_formats_that_are_enforced(tokenizer: Tokenizer, validator: GuideValidator, name: str) -> None:
    assert not accepts(tokenizer, validator, {"type": "string", "format": name}, '"a b"')


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"if": {"type": "string"}, "then": {"minLength": 1}}, "if"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_refused(
    validator: GuideValidator, schema: dict[str, Any], said: str
) -> None:
    field, guide = parse_guide({"structured_outputs": {"json": schema}}, VOCABULARY)
    assert guide is not None
    with pytest.raises(RequestError, match=rf"`structured_outputs\.json`: .*{said}"):
        validator.validate(guide, field)


def test_names_and_data_are_no_keywords() -> None:
    schema = {
        "properties": {"format": {"type": "string", "format": "color"}, "uniqueItems": False},
        "enum": [{"format": "color"}],
        "default": {"uniqueItems": False},
        "items": [{"format": "color", "minLength": 1}, True],
    }
    assert without_annotations(schema) == {
        "properties": {"format": {"type": "string"}, "uniqueItems": False},
        "enum": [{"format": "color"}],
        "default": {"uniqueItems": False},
        "items": [{"minLength": 1}, True],
    }


@pytest.mark.parametrize(
    ("schema", "text", "is_allowed"),
    [
        ({"type": "number"}, "1e5", True),
        ({"type": "number", "minimum": 0}, "1e5", False),
        ({"type": "number", "minimum": 0}, "100000", True),
        ({"type": "number", "maximum": 5}, "5.5", False),
    ],
)
def test_numbers_as_the_readme_says(
    tokenizer: Tokenizer, validator: GuideValidator, schema: dict[str, Any], text: str, is_allowed: bool
) -> None:
    assert accepts(tokenizer, validator, schema, text) == is_allowed
