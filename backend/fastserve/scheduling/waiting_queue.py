"""A priority queue under a policy, with deadlines."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastserve.scheduling.policies.policy import Policy
from fastserve.types import RequestView

T = TypeVar("T")


@dataclass(slots=True)
class _Entry(Generic[T]):
    item: T
    view: RequestView
    group: Hashable
    label: Hashable
    version: int
    """Of its place in the group's heap: older ones are dead."""


class WaitingQueue(Generic[T]):
    """A heap for each group of the policy. Push and pop are O(log n); the first of each group is ranked.

    An item that leaves from the middle, or moves, only leaves a dead place behind; the heaps drop it when it
    comes to their top, and are rebuilt when most of one is dead.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._entries: dict[int, _Entry[T]] = {}
        """By number of push."""
        self._numbers: dict[tuple[str, int], int] = {}
        """By uid and index."""
        self._groups: dict[Hashable, list[tuple[tuple[float, ...], float, int, int]]] = {}
        """(order, arrival, number, version) in each"""
        self._by_deadline: list[tuple[float, int]] = []
        """(deadline, number)"""
        self._by_change: list[tuple[float, int, int]] = []
        """(time, number, version)"""
        self._num_pushed = 0
        self._num_by_label: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        """All items, in the order of their pushes."""
        return (entry.item for entry in self._entries.values())

    def __contains__(self, key: object) -> bool:
        """Whether the sequence (uid, index) waits."""
        return key in self._numbers

    def push(
        self, item: T, view: RequestView, now: float, *, label: Hashable = None, deadline: float | None = None
    ) -> None:
        """`label`: what `count_by_label` counts it under. Raises ValueError for one that waits already."""
        key = (view.uid, view.index)
        if key in self._numbers:
            raise ValueError(f"sequence {view.index} of request {view.uid} waits already")
        number = self._num_pushed
        self._num_pushed += 1
        self._policy.on_enqueue(view, now)
        self._entries[number] = _Entry(item, view, None, label, version=0)
        self._numbers[key] = number
        self._num_by_label[label] += 1
        self._place(number, now)
        if deadline is not None:
            heapq.heappush(self._by_deadline, (deadline, number))

    def peek(self, now: float) -> T | None:
        """The first item, which stays; None if nobody waits."""
        number = self._first(now)
        return None if number is None else self._entries[number].item

    def pop(self, now: float) -> T:
        """The first item, which leaves to run. Raises IndexError if nobody waits."""
        number = self._first(now)
        if number is None:
            raise IndexError("nobody waits")
        self._policy.on_admit(self._entries[number].view, now)
        return self._take(number)

    def remove(self, uid: str, index: int = 0) -> T | None:
        """The item of that sequence, which leaves for good; None if it does not wait."""
        number = self._numbers.get((uid, index))
        if number is None:
            return None
        self._policy.on_abandon(self._entries[number].view)
        return self._take(number)

    def expired(self, now: float) -> list[T]:
        """The items whose deadline has come, which leave for good."""
        items = []
        while (deadline := self.next_deadline) is not None and deadline <= now:
            view = self._entries[self._by_deadline[0][-1]].view
            self._policy.on_abandon(view)
            items.append(self._take(self._by_deadline[0][-1]))
        return items

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of the items; None if none has one."""
        while self._by_deadline and self._by_deadline[0][-1] not in self._entries:
            heapq.heappop(self._by_deadline)
        return self._by_deadline[0][0] if self._by_deadline else None

    @property
    def next_change(self) -> float | None:
        """When time alone may change who is first, as far as the policy says; None: never."""
        while self._by_change and self._is_dead(*self._by_change[0][1:]):
            heapq.heappop(self._by_change)
        return self._by_change[0][0] if self._by_change else None

    def count_by_label(self) -> dict[Any, int]:
        """How many wait of each label that was ever seen: 0 where nobody does any more."""
        return dict(self._num_by_label)

    def _place(self, number: int, now: float) -> None:
        """Puts an item where it belongs now; where it was before is dead."""
        entry = self._entries[number]
        view, policy = entry.view, self._policy
        entry.version += 1
        group = policy.group(view)
        heap = self._groups.setdefault(group, [])
        heapq.heappush(heap, (policy.order(view, now), view.arrival, number, entry.version))
        entry.group = group
        change = policy.next_change(view, now)
        if change is not None:
            # A change that has come already, by rounding, must not be looked for again and again.
            heapq.heappush(
                self._by_change, (max(change, math.nextafter(now, math.inf)), number, entry.version)
            )
        self._compact(heap)

    def _first(self, now: float) -> int | None:
        while (change := self.next_change) is not None and change <= now:
            self._place(heapq.heappop(self._by_change)[1], now)
        firsts = []
        for group, heap in list(self._groups.items()):
            while heap and self._is_dead(*heap[0][2:]):
                heapq.heappop(heap)
            if heap:
                firsts.append(heap[0])
            else:
                del self._groups[group]
        if len(firsts) <= 1:
            return firsts[0][2] if firsts else None
        rank, entries = self._policy.rank, self._entries
        return min(firsts, key=lambda first: (rank(entries[first[2]].view, now), *first[1:]))[2]

    def _is_dead(self, number: int, version: int) -> bool:
        entry = self._entries.get(number)
        return entry is None or entry.version != version

    def _take(self, number: int) -> T:
        entry = self._entries.pop(number)
        del self._numbers[(entry.view.uid, entry.view.index)]
        self._num_by_label[entry.label] -= 1
        return entry.item

    def _compact(self, heap: list[tuple[tuple[float, ...], float, int, int]]) -> None:
        """Rebuilds heaps most of which is dead; O(1) amortized over the pushes."""
        if len(heap) > 2 * len(self) + 16:
            heap[:] = [place for place in heap if not self._is_dead(*place[2:])]
            heapq.heapify(heap)
        if len(self._by_change) > 2 * len(self) + 16:
            self._by_change = [place for place in self._by_change if not self._is_dead(*place[1:])]
            heapq.heapify(self._by_change)
        if len(self._by_deadline) > 2 * len(self) + 16:
            self._by_deadline = [place for place in self._by_deadline if place[-1] in self._entries]
            heapq.heapify(self._by_deadline)
