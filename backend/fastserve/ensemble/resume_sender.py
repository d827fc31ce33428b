"""Tells `engine` which preempted sequences run again, and whether anybody waits: from `scheduler`.

Not as the answer to a message of `engine`: a stub of Triton server 2.51 was seen to end while it took in the
outputs of a request of its own.
"""

from __future__ import annotations

import threading
from functools import partial

from fastserve.ensemble.messaging import call
from fastserve.ensemble.readiness import report_health
from fastserve.scheduling.capacity import ResumeList
from fastserve.service_thread import ServiceThread

RETRY_SECONDS = 0.2


class ResumeSender:
    """A thread, and the newest list: `execute` must not wait for another model."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._latest = self._sent = ResumeList(0, [])
        self._failed = False
        """The last call raised: it is repeated after a pause."""
        self._stopping = False
        self._thread = ServiceThread(
            "resumes", self._send_latest, on_health=partial(report_health, "scheduler")
        )
        self._thread.start()

    def send(self, resumes: ResumeList) -> None:
        """Takes in the newest list; never waits. It is sent if it is a new one, or the queue gets empty or
        is empty no more."""
        with self._changed:
            self._latest = resumes
            if self._has_news():
                self._changed.notify()

    def _has_news(self) -> bool:
        latest, sent = self._latest, self._sent
        return latest.number != sent.number or (latest.num_waiting > 0) is not (sent.num_waiting > 0)

    def _send_latest(self) -> bool:
        with self._changed:
            if self._failed:
                self._changed.wait_for(lambda: self._stopping, RETRY_SECONDS)
            self._changed.wait_for(lambda: self._stopping or self._has_news())
            if self._stopping:
                return False
            latest = self._latest
        self._failed = True
        call("engine", "resumes", latest)
        self._failed = False
        with self._changed:
            self._sent = latest
        return True

    def close(self) -> None:
        """Ends the thread, and waits for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
