"""The liveness probe: notices that the server, or the stub of one of its models, has died.

Triton server does not: the clients of a dead stub hang for ever, and so does the server's exit.
"""

from __future__ import annotations

import time

import psutil

from fastserve.launcher.server_process import NO_ANSWER, NOT_READY, ServerProcess, is_alive
from fastserve.launcher.stall_detector import StallDetector

DISCOVERY_SECONDS = 1.0
"""Between two searches for new stubs."""
UNRESPONSIVE_SECONDS = 10.0
"""Without an answer and without progress, after which a server that has lost a stub is taken for stuck: while
models load it may wait for the stub for ever."""


class HealthMonitor:
    """The liveness of one run of the server."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._stubs: dict[psutil.Process, str] = {}
        self._next_discovery = 0.0
        self._stall_detector: StallDetector | None = None
        """Made when the server does not answer: whether it computes meanwhile."""

    def discover_stubs(self) -> None:
        """Finds new stubs. One that dies before it is found here goes unnoticed."""
        self._stubs |= self._server.stubs()
        self._next_discovery = time.monotonic() + DISCOVERY_SECONDS

    def failure(self) -> str | None:
        """What has died since the last call, as a sentence; None: nothing."""
        reason = self._server.exit_reason()
        if reason:
            return reason
        if time.monotonic() >= self._next_discovery:
            self.discover_stubs()
        for stub, model in list(self._stubs.items()):
            if not is_alive(stub) and self._model_failed(stub, model):
                return f"the process of model `{model}` ended"
        return None

    def _model_failed(self, stub: psutil.Process, model: str) -> bool:
        # A stub also ends when somebody unloads its model, or loads it anew, and that is as it should be.
        state = self._server.model_state(model)
        if state == NO_ANSWER and not self._is_stalled():
            return False  # it loads models still, or the machine is slow: asked again at the next look
        if state in ("LOADING", NOT_READY):
            return False  # its new stub is not there yet
        self._stall_detector = None
        del self._stubs[stub]
        self.discover_stubs()
        # Our models have one instance each: a stub that is there has taken the dead one's place.
        return state == NO_ANSWER or (state == "READY" and model not in self._stubs.values())

    def _is_stalled(self) -> bool:
        self._stall_detector = self._stall_detector or StallDetector(self._server.resource_usage, lambda: 0)
        return self._stall_detector.stalled_seconds() > UNRESPONSIVE_SECONDS
