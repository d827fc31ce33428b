"""Sends the stops of `postprocess` to `engine`: `execute` must not wait for another model."""

from __future__ import annotations

import queue
from functools import partial

from fastserve.ensemble.messaging import call
from fastserve.ensemble.readiness import report_health
from fastserve.service_thread import ServiceThread
from fastserve.types import Cancel


class StopSender:
    """A thread, and its queue of stops, without a bound: there is one a sequence."""

    def __init__(self) -> None:
        self._stops: queue.SimpleQueue[Cancel | None] = queue.SimpleQueue()
        self._unsent: Cancel | None = None
        """The stop that could not be sent yet."""
        self._stopping = False
        on_health = partial(report_health, "postprocess")
        self._thread = ServiceThread("stops", self._send_next, on_health=on_health)
        self._thread.start()

    def send(self, stop: Cancel) -> None:
        """Takes in a stop; never waits."""
        self._stops.put(stop)

    def _send_next(self) -> bool:
        """Sends the next stop. One that fails is sent again."""
        stop = self._unsent or self._stops.get()
        if stop is None or self._stopping:
            return False
        self._unsent = stop
        call("engine", "stop", stop)
        self._unsent = None
        return True

    def close(self) -> None:
        """Ends the thread, and waits for it."""
        self._stopping = True
        self._stops.put(None)
        self._thread.join()
