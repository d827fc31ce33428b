"""Events that must not be lost on their way to another model, whatever becomes of a message."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Outbox(Generic[T]):
    """What the other side must learn once. A batch stays the same until its number has been seen."""

    def __init__(self) -> None:
        self.number = 0
        """Of the present batch; each has a number one higher than the one before."""
        self._batch: list[T] = []
        self._next: list[T] = []

    def add(self, item: T) -> None:
        """Puts an item into the next batch."""
        self._next.append(item)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell, as far as is known."""
        return not self._batch and not self._next

    def acknowledge(self, number: int) -> None:
        """The other side has seen all batches up to that number."""
        if number >= self.number:
            self._batch = []

    def batch(self) -> list[T]:
        """What is to be told now, under `number`."""
        if not self._batch and self._next:
            self._batch, self._next = self._next, []
            self.number += 1
        return self._batch
