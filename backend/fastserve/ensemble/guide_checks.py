"""Guided requests are answered when it is known whether their guide compiles, which takes up to seconds.

Threads wait for that, while `execute` of `preprocess` goes on: a heavy grammar delays nobody else.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.ensemble.messaging import send_response_or_error
from fastserve.errors import ErrorCode, RequestError
from fastserve.text.input_processor import ParsedRequest

MAX_GUIDES_AT_ONCE = 8
"""Guides that are compiled at once."""
MAX_GUIDED_REQUESTS = 256
"""Requests whose guides are compiled or wait for it; more are refused."""


class GuideChecks:
    """The threads, and the requests that wait for one."""

    def __init__(self, answer: Callable[[ParsedRequest], pb_utils.InferenceResponse]) -> None:
        """`answer`: the response to a request, when its guide has been compiled; never raises."""
        self._answer = answer
        self._threads = ThreadPoolExecutor(MAX_GUIDES_AT_ONCE, thread_name_prefix="guides")
        self._slots = BoundedSemaphore(MAX_GUIDED_REQUESTS)

    def submit(self, parsed: ParsedRequest, sender: Any) -> None:
        """Answers the request from a thread. Raises RequestError where too many wait already."""
        if not self._slots.acquire(blocking=False):
            raise RequestError(
                f"`{parsed.guide_field}`: {MAX_GUIDED_REQUESTS} requests wait for their turn already",
                ErrorCode.UNAVAILABLE,
            )
        self._threads.submit(self._check, parsed, sender)

    def _check(self, parsed: ParsedRequest, sender: Any) -> None:
        try:
            response = self._answer(parsed)
        finally:
            self._slots.release()
        send_response_or_error(sender, response)

    def close(self) -> None:
        """Waits until all that wait are answered, and ends the threads."""
        self._threads.shutdown()
