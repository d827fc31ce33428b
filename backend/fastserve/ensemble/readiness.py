"""Makes Triton server's `/v2/health/ready` say "not ready" while a worker or a thread of ours is gone.

A Python model of 2.51 cannot say so itself. But a model that is being unloaded while a request of it is in
flight counts as not ready. So an ensemble `readiness`, whose one step is `engine`, is unloaded while `engine`
holds a request of it. It works where the operator, or our launcher, has set explicit model control
(FASTSERVE_MODEL_CONTROL=explicit), and is done nowhere else.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.ensemble.final_response import send_final
from fastserve.ensemble.tensors import call, message_tensor
from fastserve.service_thread import ServiceThread
from fastserve.types import Hold

logger = logging.getLogger(__name__)

MODEL = "readiness"
CONTROL_VARIABLE = "FASTSERVE_MODEL_CONTROL"
HOLD_SECONDS = 5.0
"""For the held request to arrive."""


class Readiness:
    """Ready as long as nothing is wrong. Any thread says what is; one of its own tells the server."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._problems: dict[str, str] = {}
        self._is_ready = True
        """What the server says."""
        self._held: Any = None
        self._holder: threading.Thread | None = None
        self._stopping = False
        self._thread = ServiceThread("readiness", self._follow)
        if os.environ.get(CONTROL_VARIABLE) == "explicit":
            self._thread.start()

    def hold(self, sender: Any) -> None:
        """`engine` has been given the request to hold: it is answered when readiness is regained."""
        with self._changed:
            self._held = sender
            self._changed.notify_all()

    def set(self, source: str, problem: str | None) -> None:
        """What is wrong with `source`, as a sentence; None: nothing any more. Never waits."""
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
        if self._holder is None or not self._holder.is_alive():
            self._holder = threading.Thread(target=self._send_request_to_hold, name="held", daemon=True)
            self._holder.start()
        with self._changed:
            self._changed.wait_for(lambda: self._held is not None or self._stopping, HOLD_SECONDS)
            if self._stopping:
                return
            if self._held is None:
                raise RuntimeError("no request to hold has come; the server still says that it is ready")
        pb_utils.unload_model(model_name=MODEL)
        self._is_ready = False

    @staticmethod
    def _send_request_to_hold() -> None:
        try:
            call(MODEL, [message_tensor("hold", Hold())])
        except Exception as error:  # `_lose` sends another
            logger.error("readiness: %s", error)

    def _regain(self) -> None:
        self._release()
        if self._holder is not None:
            self._holder.join()
        pb_utils.load_model(model_name=MODEL)
        self._is_ready = True

    def _release(self) -> None:
        with self._changed:
            held, self._held = self._held, None
        if held is not None:
            send_final(held)

    def stop(self) -> None:
        """Answers the held request, so that the server can shut down."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._release()
