"""How an error tells of the tensors that a checkpoint has not, or has too many."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 8


def tensor_problems(**names: Sequence[str]) -> str:
    """The names of each kind: `missing tensors: a, b; unexpected tensors: c`. Empty if there are none."""
    return "; ".join(f"{kind} tensors: {shorten(found)}" for kind, found in names.items() if found)


def shorten(names: Sequence[str]) -> str:
    """The first eight names, and how many more there are."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
