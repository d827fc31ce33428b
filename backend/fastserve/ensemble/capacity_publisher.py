"""Publishes the engine's capacity to `scheduler`, from a thread of its own, always the newest numbers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from msgspec.structs import replace

from fastserve.ensemble.messaging import call
from fastserve.errors import RequestError
from fastserve.service_thread import ServiceThread
from fastserve.types import EngineCapacity

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.2
REPEAT_SECONDS = 2.0
"""Numbers that have not changed are sent again: so the scheduler learns that a request has not come."""


class CapacityPublisher:
    """A mailbox of one message: numbers that are not yet sent are replaced by newer ones."""

    def __init__(self, on_health: Callable[[str | None], None], after: Callable[[], None]) -> None:
        """`on_health`: see `ServiceThread`. `after`: called in this thread after each message."""
        self._changed = threading.Condition()
        self._after = after
        self._latest: EngineCapacity | None = None
        self._published: EngineCapacity | None = None
        self._serial = 0
        self._is_open = False
        self._stopping = False
        self._thread = ServiceThread("capacity", self._publish_latest, on_health=on_health)
        self._thread.start()

    def open(self) -> None:
        """Begins to send: the server is up. Triton server 2.51 was seen to crash otherwise."""
        if not self._is_open:
            with self._changed:
                self._is_open = True
                self._changed.notify()

    def publish(self, capacity: EngineCapacity) -> None:
        """Hands over the newest numbers, without `serial` and `time`. Never waits for the scheduler."""
        if capacity != self._latest:
            with self._changed:
                self._latest = capacity
                self._changed.notify()

    def _publish_latest(self) -> bool:
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or (self._is_open and self._latest != self._published), REPEAT_SECONDS
            )
            latest = self._latest if self._is_open else None
            if self._stopping or latest is None:
                return not self._stopping
        self._serial += 1
        try:
            numbered = replace(latest, serial=self._serial, time=time.monotonic())
            call("scheduler", "capacity", numbered)
        except RequestError as error:  # it may still be loading
            logger.debug("the capacity was not published: %s", error)
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, RETRY_SECONDS)
        else:
            self._published = latest
        self._after()
        return True

    def stop(self) -> None:
        """Ends the thread, and waits for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
