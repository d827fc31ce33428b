"""A call that is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TypeVar

Call = Callable[[], object]
T = TypeVar("T")


def on_each(function: Callable[[T], object], copies: Iterable[T]) -> list[Call]:
    """A call of the function on each copy of what it reads."""
    return [functools.partial(function, copy) for copy in copies]
