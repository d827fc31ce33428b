"""Makes Triton server's `/v2/health/ready` say "not ready" while there is no worker, or a thread fails.

A Python model of 2.51 cannot say so itself. But a model in the state UNLOADING, which lasts as long as a
request of it is in flight, counts as not ready. So the ensemble `readiness`, which consists of `engine`
alone, is unloaded while `engine` leaves a request of it unanswered. That works where the operator, or our
launcher, has set explicit model control (FASTSERVE_MODEL_CONTROL=explicit), and is done nowhere else.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.config import MODEL_CONTROL_VARIABLE
from fastserve.ensemble.control_messages import BlockUnload, HealthReport
from fastserve.ensemble.messaging import call, send_final
from fastserve.service_thread import ServiceThread

logger = logging.getLogger(__name__)

MODEL = "readiness"
ARRIVAL_SECONDS = 5.0
"""For the request that blocks the unloading to arrive at `engine`."""


def report_health(model: str, problem: str | None) -> None:
    """Reports to `engine` whether a thread of `model` works; see `HealthReport`. Raises as `call` does."""
    call("engine", "health", HealthReport(model, problem))


class Readiness:
    """Ready as long as no source has a problem. Any thread sets one; a thread of its own tells the server."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._problems: dict[str, str] = {}
        self._is_ready = True
        """What the server answers."""
        self._blocking: Any = None
        """The response sender of the request that blocks the unloading."""
        self._requester: threading.Thread | None = None
        self._stopping = False
        self._thread = ServiceThread("readiness", self._follow)
        if os.environ.get(MODEL_CONTROL_VARIABLE) == "explicit":
            self._thread.start()

    def block_unload(self, sender: Any) -> None:
        """Takes in the request that `engine` leaves unanswered until readiness is regained."""
        with self._changed:
            self._blocking = sender
            self._changed.notify_all()

    def set(self, source: str, problem: str | None) -> None:
        """Sets what is wrong with `source`, as a sentence; None: nothing any more. Never waits."""
        with self._changed:
            if problem is None:
                self._problems.pop(source, None)
            else:
                logger.error("not ready: %s", problem)
                self._problems[source] = problem
            self._changed.notify_all()

    def _follow(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._is_ready == bool(self._problems))
            if self._stopping:
                return False
        if self._is_ready:
            self._lose()
        else:
            self._regain()
        return True

    def _lose(self) -> None:
        if self._requester is None or not self._requester.is_alive():
            self._requester = threading.Thread(target=self._request_block, name="block-unload", daemon=True)
            self._requester.start()
        with self._changed:
            self._changed.wait_for(lambda: self._blocking is not None or self._stopping, ARRIVAL_SECONDS)
            if self._stopping:
                return
            if self._blocking is None:
                raise RuntimeError(
                    "no request of `readiness` has come; the server still says that it is ready"
                )
        pb_utils.unload_model(model_name=MODEL)
        self._is_ready = False

    @staticmethod
    def _request_block() -> None:
        try:
            call(MODEL, "health", BlockUnload())
        except Exception as error:  # `_lose` sends another
            logger.error("readiness: %s", error)

    def _regain(self) -> None:
        self._unblock()
        if self._requester is not None:
            self._requester.join()
        pb_utils.load_model(model_name=MODEL)
        self._is_ready = True

    def _unblock(self) -> None:
        with self._changed:
            blocking, self._blocking = self._blocking, None
        if blocking is not None:
            send_final(blocking)

    def stop(self) -> None:
        """Answers the request that blocks the unloading, so that the server can shut down."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._unblock()
