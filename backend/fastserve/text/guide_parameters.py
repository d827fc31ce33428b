"""From `structured_outputs` or `guided_decoding` in a request to a `Guide`; the names are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from fastserve.errors import RequestError, invalid
from fastserve.text.coercion import coerce, decode_json, decode_text, unknown_name
from fastserve.text.json_schema import without_annotations
from fastserve.text.vocabulary import Vocabulary
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
        raise invalid(name, kinds, f"exactly one of {', '.join(_KINDS)}")
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
