"""What in a JSON schema restricts nothing, and would yet be refused by the compiler of guides.

`format` is an annotation unless a validator knows the name (JSON Schema 2020-12, "Validation", section 7):
llguidance enforces some, and refuses a schema with any other. It also refuses keywords that it does not
implement where their values allow everything. Those go; all else stays, and is enforced or refused there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENFORCED_FORMATS = frozenset(
    ["date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"]
)
_SCHEMAS_BY_NAME = frozenset(["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"])
_DATA = frozenset(["const", "enum", "default", "example", "examples", "x-guidance"])
_ALLOW_ALL_IF_EMPTY = frozenset(["dependencies", "dependentRequired", "dependentSchemas"])
_ALLOW_ALL_IF_TRUE = frozenset(["propertyNames", "unevaluatedItems", "unevaluatedProperties"])


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
