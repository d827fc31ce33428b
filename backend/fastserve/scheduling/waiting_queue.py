"""A priority queue with deadlines: the highest key first."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class QueueFullError(Exception):
    """The queue holds as many items as it may."""


@dataclass(frozen=True, slots=True)
class _Entry(Generic[T]):
    item: T
    uid: Hashable
    priority: int


class WaitingQueue(Generic[T]):
    """A heap by key; ties go to the earlier arrival, then to the earlier push. Push and pop are O(log n).

    An item that leaves from the middle only disappears from `_entries`; the heaps drop what is dead when it
    comes to their top, and are rebuilt when most of one is dead.
    """

    def __init__(self, capacity: int | None = None) -> None:
        """`capacity`: None for no bound."""
        self._capacity = capacity
        self._entries: dict[int, _Entry[T]] = {}
        """By number of push."""
        self._numbers: dict[Hashable, int] = {}
        """By uid."""
        self._by_rank: list[tuple[float, float, int]] = []
        """(-key, arrival, number)"""
        self._by_deadline: list[tuple[float, float, int]] = []
        """(deadline, arrival, number)"""
        self._num_pushed = 0
        self._num_by_priority: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        """All items, in the order of their pushes."""
        return (entry.item for entry in self._entries.values())

    def push(
        self,
        item: T,
        *,
        uid: Hashable,
        key: float,
        arrival: float,
        priority: int = 0,
        deadline: float | None = None,
    ) -> None:
        """Raises QueueFullError, and ValueError for a uid that waits already."""
        if self._capacity is not None and len(self) >= self._capacity:
            raise QueueFullError(f"{len(self)} wait already; allowed: at most {self._capacity}")
        if uid in self._numbers:
            raise ValueError(f"{uid!r} waits already")
        number = self._num_pushed
        self._num_pushed += 1
        self._entries[number] = _Entry(item, uid, priority)
        self._numbers[uid] = number
        self._num_by_priority[priority] += 1
        heapq.heappush(self._by_rank, (-key, arrival, number))
        if deadline is not None:
            heapq.heappush(self._by_deadline, (deadline, arrival, number))

    def peek(self) -> T | None:
        """The first item, which stays; None if nobody waits."""
        self._drop_dead()
        return self._entries[self._by_rank[0][-1]].item if self._by_rank else None

    def pop(self) -> T:
        """The first item, which leaves. Raises IndexError if nobody waits."""
        self._drop_dead()
        return self._take(self._by_rank[0][-1])

    def remove(self, uid: Hashable) -> T | None:
        """The item of that uid, which leaves; None if it does not wait."""
        number = self._numbers.get(uid)
        return None if number is None else self._take(number)

    def expired(self, now: float) -> list[T]:
        """The items whose deadline has come, which leave."""
        items = []
        while (deadline := self.next_deadline) is not None and deadline <= now:
            items.append(self._take(self._by_deadline[0][-1]))
        return items

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of the items; None if none has one."""
        self._drop_dead()
        return self._by_deadline[0][0] if self._by_deadline else None

    def count_by_priority(self) -> dict[int, int]:
        """How many wait of each priority that was ever seen: 0 where nobody does any more."""
        return dict(self._num_by_priority)

    def _take(self, number: int) -> T:
        entry = self._entries.pop(number)
        del self._numbers[entry.uid]
        self._num_by_priority[entry.priority] -= 1
        return entry.item

    def _drop_dead(self) -> None:
        """Lets both heaps begin with an item that waits; O(log n) amortized over the pushes."""
        for heap in (self._by_rank, self._by_deadline):
            if len(heap) > 2 * len(self) + 16:
                heap[:] = [rank for rank in heap if rank[-1] in self._entries]
                heapq.heapify(heap)
            while heap and heap[0][-1] not in self._entries:
                heapq.heappop(heap)
