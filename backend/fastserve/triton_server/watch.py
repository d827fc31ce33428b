"""Notices that the server, or the stub of one of its models, has died.

Triton server does not: the clients of a dead stub hang for ever, and so does the server's exit.
"""

from __future__ import annotations

import time

import psutil

from fastserve.triton_server.server_process import ServerProcess, is_alive

SEARCH_SECONDS = 1.0
"""Between two looks for new stubs."""
UNWANTED_STATES = ("READY", "LOADING", "")
"""States of a model in which the end of its stub is a crash; `""`: the server does not answer."""


class Watch:
    """Over one run of the server."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._stubs: dict[psutil.Process, str] = {}
        self._next_search = 0.0

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
            if not is_alive(stub):
                del self._stubs[stub]
                # A stub also ends when somebody unloads its model, and that is as it should be.
                if self._server.model_state(model) in UNWANTED_STATES:
                    return f"the process of model `{model}` ended"
        return None
