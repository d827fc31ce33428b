"""Cancellations by the client's id, of requests that may still be on their way to the engine."""

from __future__ import annotations

from collections import OrderedDict

from fastserve.ensemble.control_messages import CancelById
from fastserve.types import Request

MAX_REMEMBERED = 10_000
"""Ids; the oldest is forgotten first."""


class RecentCancellations:
    """The time of each id's last cancellation, for as long as a request that had arrived by then can live."""

    def __init__(self, max_request_seconds: float) -> None:
        self._max_request_seconds = max_request_seconds
        self._times: OrderedDict[tuple[str, str | None], float] = OrderedDict()
        """By id and tenant."""

    def add(self, cancel: CancelById) -> None:
        """Remembers `cancel`; they come in the order of their times, or nearly so."""
        name = (cancel.request_id, cancel.tenant)
        time = max(cancel.time, self._times.pop(name, cancel.time))
        self._times[name] = time
        while len(self._times) > MAX_REMEMBERED or self._oldest <= time - self._max_request_seconds:
            self._times.popitem(last=False)

    def applies_to(self, request: Request) -> bool:
        """Whether the request had arrived when its id was cancelled: a later one of that id lives."""
        names = ((request.request_id, None), (request.request_id, request.tenant))
        return any(request.arrival <= self._times.get(name, -1.0) for name in names)

    def __len__(self) -> int:
        return len(self._times)

    @property
    def _oldest(self) -> float:
        return next(iter(self._times.values()))
