"""Requests that have been released once: a message of this server is good for one request, whoever has it.

A client may call the models of the ensemble one by one, with what each has signed. Sent again, such a message
would be a request that no quota counts and no revoked key stops.
"""

from __future__ import annotations

from collections import deque

from fastserve.types import Request


class SpentRequests:
    """Remembers each request for as long as it may run; after that its deadline ends it at once."""

    def __init__(self, max_request_seconds: float) -> None:
        self._max_request_seconds = max_request_seconds
        self._uids: set[str] = set()
        self._ends: deque[tuple[float, str]] = deque()
        """When each may be forgotten, in the order in which they came."""

    def spend(self, request: Request, now: float) -> bool:
        """Whether it comes for the first time."""
        while self._ends and self._ends[0][0] <= now:
            self._uids.discard(self._ends.popleft()[1])
        if request.uid in self._uids:
            return False
        self._uids.add(request.uid)
        self._ends.append((now + self._max_request_seconds, request.uid))
        return True

    def __len__(self) -> int:
        return len(self._uids)
