"""Lets a server finish what it has accepted, before it is ended.

New requests are refused by `preprocess`, until FastServe's gauges say that nothing waits or runs. Then the
models that clients call are unloaded, which leaves the requests in them running: when they are unloaded,
nothing is in flight. Triton server's own stop does not: on SIGTERM, 2.51 lets its gRPC streams stand still.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

ENTRANCES = ("fastserve_infer", "fastserve")
"""What clients call, in an order in which none needs one that was unloaded before."""
UNLOADED = "UNAVAILABLE"


class DrainedServer(Protocol):
    """What a drain asks of a server; `ServerProcess` is one."""

    def requests_in_flight(self) -> float | None:
        """Requests that wait or run, by the gauges; None: no answer now."""

    def unload(self, model: str) -> bool | None:
        """Asks for it. False: the server refuses; None: no answer now."""

    def model_state(self, model: str) -> str:
        """As Triton server's repository index names it; empty: no answer now."""


class Drain:
    """Of one server, in steps that do not wait for one another."""

    def __init__(self, server: DrainedServer, models: Sequence[str], stopping_file: Path) -> None:
        """`models`: all of the repository; one that is not FastServe's is taken for what clients call."""
        self._server = server
        self._to_unload = [name for name in ENTRANCES if name in models] or list(models)
        self._to_end: list[str] = []
        self._has_run_empty = False
        stopping_file.touch()

    def is_done(self) -> bool:
        """Takes the next step that can be taken. True: nothing is in flight any more."""
        if not self._has_run_empty and self._server.requests_in_flight() != 0:
            return False
        self._has_run_empty = True
        while self._to_unload:
            unloads = self._server.unload(self._to_unload[0])
            if unloads is None:
                return False
            model = self._to_unload.pop(0)
            if unloads:
                self._to_end.append(model)
        self._to_end = [name for name in self._to_end if self._server.model_state(name) != UNLOADED]
        return not self._to_end
