"""The fields of `Config` as command-line flags.

argparse parses them and msgspec checks them: the libraries that make flags of a class (tyro, cyclopts,
jsonargparse) read neither the descriptions nor the bounds that msgspec keeps with the fields.
"""

from __future__ import annotations

import argparse
import json
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
    type_info,
)

from fastserve.config import Config, ConfigError

OPTIONS: Mapping[type, Mapping[str, Any]] = {
    BoolType: {"action": argparse.BooleanOptionalAction},
    IntType: {"type": int, "metavar": "N"},
    FloatType: {"type": float, "metavar": "X"},
    StrType: {"metavar": "TEXT"},
    DictType: {"type": json.loads, "metavar": "JSON"},
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
        default = "none" if field.default in ("", msgspec.NODEFAULT) else field.default
        group.add_argument(
            flag(field.name),
            help=f"{description} (default: {default})".replace("%", "%%"),
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
    reason, _, path = str(error).partition(" - at `$.")
    name = path.rstrip("`")
    return f"{flag(name)}: got {values[name]!r}: {reason}" if name in values else reason
