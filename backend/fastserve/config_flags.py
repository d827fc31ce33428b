"""The fields of `Config` as command-line flags.

argparse parses them and msgspec checks them: the libraries that make flags of a class (tyro, cyclopts,
jsonargparse) read neither the descriptions nor the bounds that msgspec keeps with the fields.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from msgspec.inspect import (
    BoolType,
    DictType,
    FloatType,
    IntType,
    LiteralType,
    Metadata,
    StrType,
    StructType,
    TupleType,
    type_info,
)

from fastserve.config import Config, ConfigError


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: LOW,HIGH, two integers") from error


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: JSON ({error})") from error


OPTIONS: Mapping[type, Mapping[str, Any]] = {
    BoolType: {"action": argparse.BooleanOptionalAction},
    IntType: {"type": int, "metavar": "N"},
    FloatType: {"type": float, "metavar": "X"},
    StrType: {"metavar": "TEXT"},
    DictType: {"type": _json, "metavar": "JSON"},
    TupleType: {"type": _integers, "metavar": "LOW,HIGH"},
}
"""How argparse takes a field of each type; one of several given words takes those."""


def flag(field: str) -> str:
    """A field's flag: its name with dashes."""
    return "--" + field.replace("_", "-")


def add_config_flags(
    parser: argparse.ArgumentParser, names: Collection[str] = Config.__struct_fields__
) -> None:
    """Adds one flag per field of those names. One that is not given is absent from the parsed arguments."""
    group = parser.add_argument_group("settings")
    settings = type_info(Config)
    assert isinstance(settings, StructType)
    for field in settings.fields:
        if field.name not in names:
            continue
        assert isinstance(field.type, Metadata), f"{field.name} has no description"
        kind, description = field.type.type, (field.type.extra_json_schema or {})["description"]
        group.add_argument(
            flag(field.name),
            help=f"{description} (default: {_shown(field.default)})".replace("%", "%%"),
            default=argparse.SUPPRESS,
            **({"choices": kind.values} if isinstance(kind, LiteralType) else OPTIONS[type(kind)]),
        )


def config_from(arguments: argparse.Namespace) -> Config:
    """The settings that were given, the defaults for the others. Raises ConfigError naming the flag."""
    values = {name: value for name, value in vars(arguments).items() if name in Config.__struct_fields__}
    try:
        return msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_reason(error, values)) from error


def _reason(error: msgspec.ValidationError, values: Mapping[str, Any]) -> str:
    """msgspec's sentence with the flag in place of the path; one about several fields names them itself."""
    reason, _, path = str(error).partition(" - at ")
    field = re.search(r"\$\.(\w+)", path)
    if field is None:
        return reason
    where = "" if path == f"`$.{field[1]}`" else f" at {path}"
    return f"{flag(field[1])}: got {values[field[1]]!r}: {reason}{where}"


def _shown(default: Any) -> str:
    if default in ("", msgspec.NODEFAULT):
        return "none"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
