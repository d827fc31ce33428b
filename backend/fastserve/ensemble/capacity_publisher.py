"""Tells `scheduler` what room the engine has, from a thread of its own, always the newest numbers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from fastserve.ensemble.tensors import call, message_tensor
from fastserve.errors import RequestError
from fastserve.service_thread import ServiceThread
from fastserve.types import EngineCapacity

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.2
REPEAT_SECONDS = 2.0
"""What has not changed is said again: so the scheduler learns that a request has not come."""


class Numbers(NamedTuple):
    """The fields of `EngineCapacity` that the engine fills in."""

    incarnation: str
    received: int
    arrived: int
    free_slots: int
    lowest_key: float | None
    max_model_len: int | None


class CapacityPublisher:
    """A mailbox of one message: what is not yet sent is replaced by what is newer."""

    def __init__(self, on_health: Callable[[str | None], None], after: Callable[[], None]) -> None:
        """`on_health`: see `ServiceThread`. `after`: called in this thread after each message."""
        self._changed = threading.Condition()
        self._after = after
        self._numbers: Numbers | None = None
        self._told: Numbers | None = None
        self._serial = 0
        self._is_open = False
        self._stopping = False
        self._thread = ServiceThread("capacity", self._tell_scheduler, on_health=on_health)
        self._thread.start()

    def open(self) -> None:
        """Begins to send: the server is up. Triton server 2.51 was seen to crash otherwise."""
        if not self._is_open:
            with self._changed:
                self._is_open = True
                self._changed.notify()

    def tell(self, numbers: Numbers) -> None:
        """The newest numbers, under the caller's lock."""
        if numbers != self._numbers:
            with self._changed:
                self._numbers = numbers
                self._changed.notify()

    def _tell_scheduler(self) -> bool:
        numbers = self._next()
        if numbers is None:
            return not self._stopping
        self._serial += 1
        capacity = EngineCapacity(serial=self._serial, time=time.monotonic(), **numbers._asdict())
        try:
            call("scheduler", [message_tensor("capacity", capacity)])
        except RequestError as error:  # it may still be loading
            logger.debug("room not told: %s", error)
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, RETRY_SECONDS)
        else:
            self._told = numbers
        self._after()
        return True

    def _next(self) -> Numbers | None:
        """Waits for numbers that were not told yet, or for the time to repeat them; None: nothing to tell."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or (self._is_open and self._numbers != self._told), REPEAT_SECONDS
            )
            return None if self._stopping or not self._is_open else self._numbers

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.hurry()
        self._thread.join()
