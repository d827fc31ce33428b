"""Messages between the ensemble's models beside those that every request meets, which are in `types`."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from fastserve.scheduling.capacity import Released
from fastserve.types import Failure, Outcome, Request


class Queued(Struct, frozen=True, tag=True):
    """From `scheduler`, before a forwarded request that it releases later: the request waits in the queue."""

    uid: str


class Rejected(Struct, frozen=True, tag=True):
    """From `scheduler`: a forwarded request that fails in the queue.

    Its failure goes the way of an answer: between models, Triton server 2.51 loses an error that follows
    a response, and `Queued` was one.
    """

    request: Request
    outcome: Outcome
    failure: Failure


SchedulerOutput: Any = Released | Queued | Rejected
"""From `scheduler` to `engine`."""


class CancelById(Struct, frozen=True):
    """To `engine`: stop the client's requests of this id that had arrived by then. Later ones live."""

    request_id: str
    time: float
    """When the cancel came."""
    tenant: str | None = None
    """Whose requests alone; None: whoever's, there are no keys."""

    def applies_to(self, request: Request) -> bool:
        """Whether it means this request."""
        return (
            request.request_id == self.request_id
            and request.arrival <= self.time
            and self.tenant in (None, request.tenant)
        )


class BlockUnload(Struct, frozen=True, tag=True):
    """To `engine`: leave this request unanswered until the server may be ready again (see `Readiness`)."""


class HealthReport(Struct, frozen=True, tag=True):
    """To `engine` from another model: whether a thread of it works."""

    source: str
    """The model."""
    problem: str | None
    """A sentence; None: it works again."""
