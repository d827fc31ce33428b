"""Guided decoding: from a request's `structured_outputs` to the grammar that llguidance compiles.

The names are vLLM's. What in a JSON schema restricts nothing, and would yet be refused by the compiler, is
dropped: `format` is an annotation unless a validator knows the name (JSON Schema 2020-12, "Validation",
section 7), but llguidance enforces some and refuses a schema with any other. It also refuses keywords that it
does not implement where their values allow everything. All else stays, and is enforced or refused there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from llguidance import LLMatcher

from fastserve.errors import RequestError, invalid
from fastserve.text.validation import Vocabulary, coerce, decode_json, decode_text, unknown_name
from fastserve.types import Guide

GUIDE_NAMES = ("structured_outputs", "guided_decoding")
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_NOT_SERVED = (
    "backend",
    "disable_additional_properties",
    "disable_any_whitespace",
    "disable_fallback",
    "structural_tag",
    "whitespace_pattern",
)

ENFORCED_FORMATS = frozenset(
    ["date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"]
)
_SCHEMAS_BY_NAME = frozenset(["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"])
_DATA = frozenset(["const", "enum", "default", "example", "examples", "x-guidance"])
_ALLOW_ALL_IF_EMPTY = frozenset(["dependencies", "dependentRequired", "dependentSchemas"])
_ALLOW_ALL_IF_TRUE = frozenset(["propertyNames", "unevaluatedItems", "unevaluatedProperties"])

_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")


def parse_guide(values: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[str, Guide | None]:
    """The guide among sampling parameters, and the field that says it, for errors; none: "" and None.

    Whether it compiles is not asked here. Raises RequestError.
    """
    names = [name for name in GUIDE_NAMES if values.get(name) is not None]
    if not names:
        return "", None
    if vocabulary.mismatch:
        raise RequestError(f"`{names[0]}`: it cannot be followed, as {vocabulary.mismatch}; allowed: none")
    if len(names) > 1:
        raise RequestError(f"`{names[0]}`: got `{names[1]}` beside it; allowed: one of them")
    name = names[0]
    given = decode_json(name, values[name])
    if not isinstance(given, Mapping):
        raise invalid(name, given, f"an object with one of {', '.join(_KINDS)}")
    for key, value in given.items():
        if key in _NOT_SERVED and value not in (None, False, ""):
            raise invalid(f"{name}.{key}", value, "not given (FastServe does not do it)")
        if key not in _NOT_SERVED and key not in _KINDS:
            raise unknown_name(f"member of `{name}`", key, _KINDS)
    kinds = [kind for kind in _KINDS if given.get(kind) not in (None, False)]
    if len(kinds) != 1:
        raise RequestError(f"`{name}`: got {kinds}; allowed: exactly one of {', '.join(_KINDS)}")
    field = f"{name}.{kinds[0]}"
    return field, _guide(field, kinds[0], given[kinds[0]])


def _guide(field: str, kind: str, value: Any) -> Guide:
    """The guide of one kind; its texts can be encoded, whether it compiles is not asked here."""
    if kind == "json_object":
        if coerce(field, value, bool) is not True:
            raise invalid(field, value, "true")
        return Guide(json='{"type": "object"}')
    if kind == "json":
        schema = decode_json(field, value)
        if not isinstance(schema, Mapping):
            raise invalid(field, schema, "a JSON schema: an object, or a string of one")
        return Guide(json=_schema_text(field, without_annotations(schema)))
    if kind == "choice":
        choices = coerce(field, value, list[str])
        if not choices or not all(decode_text(field, choice) for choice in choices):
            raise invalid(field, choices, "a list of one or more texts, none of them empty")
        return Guide(choice=choices)
    text = decode_text(field, value)
    if not text:
        raise invalid(field, text, "text that is not empty")
    return Guide(regex=text) if kind == "regex" else Guide(grammar=text)


def _schema_text(field: str, schema: Mapping[str, Any]) -> str:
    try:
        return msgspec.json.encode(schema).decode()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError(f"`{field}`: got what is no JSON ({error}); allowed: a JSON schema") from error


def without_annotations(schema: Any) -> Any:
    """The schema (decoded JSON; it may be within another) without what restricts nothing."""
    if isinstance(schema, list | tuple):
        return [without_annotations(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {key: _part(key, value) for key, value in schema.items() if not _restricts_nothing(key, value)}


def _part(keyword: str, value: Any) -> Any:
    if keyword in _DATA:
        return value
    if keyword in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
        return {name: without_annotations(schema) for name, schema in value.items()}
    return without_annotations(value)


def _restricts_nothing(keyword: str, value: Any) -> bool:
    if keyword == "format":
        return isinstance(value, str) and value not in ENFORCED_FORMATS
    if keyword == "uniqueItems":
        return value is False
    if keyword in _ALLOW_ALL_IF_TRUE:
        return value is True or value == {}
    return keyword in _ALLOW_ALL_IF_EMPTY and value == {}


def grammar_of(guide: Guide) -> str:
    """The llguidance grammar of a guide, for `LLMatcher`.

    It may be malformed, as the guide may, or too much for its compiler: `GuideValidator` tells.
    """
    if guide.json is not None:
        return LLMatcher.grammar_from_json_schema(guide.json)
    if guide.regex is not None:
        return LLMatcher.grammar_from_regex(guide.regex)
    if guide.choice is not None:
        return LLMatcher.grammar_from_regex("|".join(map(_escaped, guide.choice)))
    assert guide.grammar is not None
    return LLMatcher.grammar_from_lark(guide.grammar)


def _escaped(literal: str) -> str:
    """A regex that matches just `literal`."""
    return _SPECIAL.sub(lambda match: "\\" + match[0], literal)
