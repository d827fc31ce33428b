"""Publishes the engine's capacity to `scheduler`, from a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from msgspec.structs import replace

from fastserve.ensemble.messaging import call
from fastserve.errors import RequestError
from fastserve.scheduling.capacity import EngineCapacity, Event, ResumeList, TenantTokens
from fastserve.scheduling.outbox import Outbox
from fastserve.service_thread import ServiceThread
from fastserve.types import Resume

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.2
QUIET_SECONDS = 0.1
"""Between messages while nobody waits: each costs two stubs some half a millisecond, and steps are short."""
REPEAT_SECONDS = 2.0
"""Numbers that have not changed are sent again: so the scheduler learns that a request has not come."""


class CapacityPublisher:
    """A mailbox of one message: numbers that are not yet sent are replaced by newer ones; events are kept.

    A change of what can be released, or of what waits, is sent at once; every other one, such as of free
    blocks, as long as somebody waits, else a little later.
    """

    def __init__(
        self,
        on_health: Callable[[str | None], None],
        after: Callable[[], None],
    ) -> None:
        """`on_health`: see `ServiceThread`. `after`: called in this thread after each message."""
        self._changed = threading.Condition()
        self._after = after
        self._latest: EngineCapacity | None = None
        self._published: EngineCapacity | None = None
        self._events: Outbox[Event] = Outbox()
        self._resumes_seen = 0
        self._num_waiting = 0
        """In the queue, as it last said."""
        self._is_urgent = False
        """Something is to be sent at once."""
        self._sent_at = 0.0
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

    def tell(self, event: Event) -> None:
        """Hands over what must not be lost; it goes with the next numbers that are published."""
        with self._changed:
            self._events.add(event)
            if not isinstance(event, TenantTokens):
                self._is_urgent = True
                self._changed.notify()

    def take(self, message: ResumeList) -> list[Resume]:
        """Takes in what the queue says; returns what runs again, unless that had come before."""
        with self._changed:
            self._num_waiting = message.num_waiting
            if message.number <= self._resumes_seen:
                return []
            self._resumes_seen = message.number
            self._is_urgent = True  # the queue waits to hear that it has come
            return message.resumes

    def publish(self, capacity: EngineCapacity) -> None:
        """Hands over the newest numbers, without `serial`, `time`, events. Never waits for the scheduler."""
        with self._changed:
            had_news = self._has_news()
            self._latest = capacity
            self._is_urgent |= _releasable(capacity) != _releasable(self._published)
            self._is_urgent |= self._num_waiting > 0 and self._has_news()
            if self._is_urgent or self._has_news() is not had_news:
                self._changed.notify()

    def _has_news(self) -> bool:
        return self._latest != self._published or not self._events.is_empty

    def _wait_until_due(self) -> None:
        while not self._stopping and not (self._is_open and self._is_urgent):
            pause = QUIET_SECONDS if self._is_open and self._has_news() else REPEAT_SECONDS
            left = self._sent_at + pause - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _publish_latest(self) -> bool:
        with self._changed:
            self._wait_until_due()
            self._sent_at = time.monotonic()
            latest = self._latest if self._is_open else None
            if self._stopping or latest is None:
                return not self._stopping
            self._serial += 1
            self._is_urgent = False
            events = self._events.batch()
            message = replace(
                latest,
                serial=self._serial,
                time=self._sent_at,
                events_number=self._events.number,
                events=events,
                resumes_seen=self._resumes_seen,
            )
        try:
            call("scheduler", "capacity", message)
        except RequestError as error:  # it may still be loading
            logger.debug("the capacity was not published: %s", error)
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, RETRY_SECONDS)
                self._is_urgent = True
        else:
            with self._changed:
                self._events.acknowledge(message.events_number)
                self._published = latest
                self._is_urgent |= _releasable(self._latest) != _releasable(latest)
        self._after()
        return True

    def stop(self) -> None:
        """Ends the thread, and waits for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()


def _releasable(capacity: EngineCapacity | None) -> list[tuple[str, int, int, int]]:
    """The numbers that let the queue release something, or count what it has released."""
    if capacity is None:
        return []
    return [(each.incarnation, each.received, each.arrived, each.free_slots) for each in capacity.replicas]
