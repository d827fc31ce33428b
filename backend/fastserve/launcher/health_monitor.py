"""Notices that the server, or the stub of one of its models, has died.

Triton server does not: the clients of a dead stub hang for ever, and so does the server's exit.
"""

from __future__ import annotations

import time

import psutil

from fastserve.launcher.progress import Progress
from fastserve.launcher.server_process import NO_ANSWER, ServerProcess, is_alive

SEARCH_SECONDS = 1.0
"""Between two looks for new stubs."""
SILENCE_SECONDS = 10.0
"""Without an answer and without progress, of a server that has lost a stub: while models load it may wait for
that for ever."""


class HealthMonitor:
    """Over one run of the server."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._stubs: dict[psutil.Process, str] = {}
        self._next_search = 0.0
        self._silence: Progress | None = None
        """What the server computes while it does not answer."""

    def search(self) -> None:
        """Looks for new stubs. One that dies before it is found here goes unnoticed."""
        self._stubs |= self._server.stubs()
        self._next_search = time.monotonic() + SEARCH_SECONDS

    def loss(self) -> str | None:
        """What has died since the last call, as a sentence; None: nothing."""
        end = self._server.end()
        if end:
            return end
        if time.monotonic() >= self._next_search:
            self.search()
        for stub, model in list(self._stubs.items()):
            if not is_alive(stub) and self._model_is_lost(stub, model):
                return f"the process of model `{model}` ended"
        return None

    def _model_is_lost(self, stub: psutil.Process, model: str) -> bool:
        # A stub also ends when somebody unloads its model, or loads it anew, and that is as it should be.
        state = self._server.model_state(model)
        if state == NO_ANSWER and not self._is_stalled():
            return False  # it loads models still, or the machine is slow: asked again at the next look
        if state == "LOADING":
            return False  # as well
        self._silence = None
        del self._stubs[stub]
        self.search()
        # Our models have one instance each: a stub that is there has taken the dead one's place.
        return state == NO_ANSWER or (state == "READY" and model not in self._stubs.values())

    def _is_stalled(self) -> bool:
        self._silence = self._silence or Progress(self._server.work, lambda: 0)
        return self._silence.seconds_without() > SILENCE_SECONDS
