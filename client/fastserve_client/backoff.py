"""When a request is sent again: exponential back-off with jitter."""

from __future__ import annotations

import random

from fastserve_client.deadline import Deadline
from fastserve_client.errors import DeadlineExceeded, FastServeError

FIRST_DELAY = 0.1
LONGEST_DELAY = 5.0
LONGEST_RETRY_AFTER = 60.0
"""A server that says that the request may come again later than this is not waited for."""


class Backoff:
    """The waits between the attempts of one request.

    Only UNAVAILABLE is tried again (a full queue, a tenant over its quota, a server that is starting, a
    refused connection): every other error would come again. The k-th wait is drawn from (d/2, d),
    d = FIRST_DELAY * 2^k seconds, so that clients that were refused together do not come back together. Where
    the server says how long to wait, that is added.
    """

    def __init__(self, retries: int, deadline: Deadline) -> None:
        self.has_begun = False
        """Whether a response has come: such a request is not sent again."""
        self._retries = retries
        self._deadline = deadline
        self._attempt = 0

    def delay_after(self, error: FastServeError) -> float:
        """Seconds to wait before the next attempt.

        Raises `error` where there is to be none: it is not UNAVAILABLE, a response has come, the retries are
        used up, or the wait would be longer than LONGEST_RETRY_AFTER or than the deadline allows. Raises
        DeadlineExceeded where the deadline has passed.
        """
        if self._deadline.passed and not isinstance(error, DeadlineExceeded):
            raise DeadlineExceeded(error.message) from error  # the server's own deadline was the faster one
        if error.code != "UNAVAILABLE" or self.has_begun or self._attempt == self._retries:
            raise error
        longest = min(FIRST_DELAY * 2**self._attempt, LONGEST_DELAY)
        delay = longest * random.uniform(0.5, 1.0)
        if error.retry_after is not None:
            if error.retry_after > LONGEST_RETRY_AFTER:
                raise error
            delay += error.retry_after
        remaining = self._deadline.remaining()
        if remaining is not None and delay >= remaining:
            raise error
        self._attempt += 1
        return delay
