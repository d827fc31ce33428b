"""Types in words, for errors that say what is allowed."""

from __future__ import annotations

from msgspec import inspect


def type_words(kind: inspect.Type) -> str:
    """What a value of this type is, with its bounds: "an integer from 1 to 64"."""
    if isinstance(kind, inspect.IntType):
        return "an integer" + _bounds(kind)
    if isinstance(kind, inspect.FloatType):
        return "a number" + _bounds(kind)
    if isinstance(kind, inspect.BoolType):
        return "true or false"
    if isinstance(kind, inspect.StrType):
        return "text" if kind.max_length is None else f"text of at most {kind.max_length} characters"
    if isinstance(kind, inspect.ListType):
        return f"a list, each element {type_words(kind.item_type)}"
    if isinstance(kind, inspect.DictType):
        return f"an object from {type_words(kind.key_type)} to {type_words(kind.value_type)}"
    if isinstance(kind, inspect.UnionType):
        return " or ".join(type_words(member) for member in kind.types)
    if isinstance(kind, inspect.NoneType):
        return "null"
    raise TypeError(f"no words for {kind}")


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    if kind.ge is not None and kind.le is not None:
        return f" from {_number(kind.ge)} to {_number(kind.le)}"
    bounds = [
        f"{word} {_number(bound)}"
        for word, bound in (
            ("of at least", kind.ge),
            ("above", kind.gt),
            ("at most", kind.le),
            ("below", kind.lt),
        )
        if bound is not None
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _number(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else str(bound)
