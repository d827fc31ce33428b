"""When to try a call again: exponential back-off with jitter."""

from __future__ import annotations

import random

from fastserve_client.deadline import Deadline
from fastserve_client.errors import FastServeError

FIRST_DELAY = 0.1
LONGEST_DELAY = 5.0


class Backoff:
    """The waits between the attempts of one call.

    Only UNAVAILABLE is tried again (a full queue, a server that is starting, a refused connection): every
    other error would come again. The k-th wait is drawn from (d/2, d), d = FIRST_DELAY * 2^k seconds, so that
    clients that were refused together do not come back together.
    """

    def __init__(self, retries: int, deadline: Deadline) -> None:
        self._retries = retries
        self._deadline = deadline
        self._attempt = 0

    def delay_after(self, error: FastServeError) -> float:
        """Seconds to wait before the next attempt.

        Raises `error` itself where there is to be none: it is not UNAVAILABLE, the retries are used up, or
        the deadline would pass during the wait.
        """
        if error.code != "UNAVAILABLE" or self._attempt == self._retries:
            raise error
        longest = min(FIRST_DELAY * 2**self._attempt, LONGEST_DELAY)
        delay = longest * random.uniform(0.5, 1.0)
        remaining = self._deadline.remaining()
        if remaining is not None and delay >= remaining:
            raise error
        self._attempt += 1
        return delay
