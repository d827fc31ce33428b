"""Makes Triton server's `/v2/health/ready` say "not ready" while the engine has no worker.

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

from fastserve.errors import RequestError
from fastserve.triton_server.tensors import FINAL, call, strings

logger = logging.getLogger(__name__)

MODEL = "readiness"
CONTROL_VARIABLE = "FASTSERVE_MODEL_CONTROL"
HOLD_SECONDS = 5.0
"""For the held request to arrive."""


class Readiness:
    """Ready, or not. `lose` and `regain` are called in turn, from one thread that is not `execute`'s."""

    def __init__(self) -> None:
        self._can_control = os.environ.get(CONTROL_VARIABLE) == "explicit"
        self._held: Any = None
        self._arrived = threading.Event()
        self._holder: threading.Thread | None = None

    def hold(self, sender: Any) -> None:
        """`engine` has been given the request to hold: it is answered when readiness is regained."""
        self._held = sender
        self._arrived.set()

    def lose(self) -> None:
        if not self._can_control:
            return
        self._arrived.clear()
        self._holder = threading.Thread(target=self._send_request_to_hold, name="readiness", daemon=True)
        self._holder.start()
        if self._arrived.wait(HOLD_SECONDS):
            pb_utils.unload_model(model_name=MODEL)
        else:
            logger.error("readiness: no request to hold has come; the server still says that it is ready")

    @staticmethod
    def _send_request_to_hold() -> None:
        try:
            call(MODEL, [strings("hold", ["until the worker is back"])])
        except RequestError as error:
            logger.error("readiness: %s", error)

    def regain(self) -> None:
        if self._held is None or self._holder is None:
            return
        self.release()
        self._holder.join()
        pb_utils.load_model(model_name=MODEL)

    def release(self) -> None:
        """Answers the held request, so that the server can shut down."""
        if self._held is not None:
            self._held.send(flags=FINAL)
            self._held = None
