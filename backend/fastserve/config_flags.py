"""The fields of `Config` as command-line flags."""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from fastserve.config import Config, ConfigError


def flag(field: str) -> str:
    """A field's flag: its name with dashes."""
    return "--" + field.replace("_", "-")


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per field. One that is not given is absent from the parsed arguments."""
    group = parser.add_argument_group("settings")
    hints = get_type_hints(Config, include_extras=True)
    for field in msgspec.structs.fields(Config):
        kind, meta = _kind_and_meta(hints[field.name])
        description = (meta.description if meta else None) or ""
        group.add_argument(
            flag(field.name),
            help=f"{description} (default: {_shown(field.default)})".replace("%", "%%"),
            default=argparse.SUPPRESS,
            **_options(kind),
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


def _kind_and_meta(annotation: Any) -> tuple[Any, Meta | None]:
    """The type that a flag's text is converted to, and the field's metadata."""
    meta = next((extra for extra in getattr(annotation, "__metadata__", ()) if isinstance(extra, Meta)), None)
    kind = get_args(annotation)[0] if meta else annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(arm for arm in get_args(kind) if arm is not type(None))
        inner, inner_meta = _kind_and_meta(kind)
        return inner, meta or inner_meta
    return kind, meta


def _options(kind: Any) -> dict[str, Any]:
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind in (int, float, str):
        return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
    raise TypeError(f"a setting of type {kind} has no form as a flag")


def _shown(default: Any) -> str:
    return "none" if default in ("", None) else str(default)
