"""Lets a server finish what it has accepted, before it is ended.

New requests are refused by `preprocess`, until FastServe's gauges say that nothing waits or runs. Then the
models that clients call are unloaded, which leaves the requests in them running: when they are unloaded,
nothing is in flight. Triton server's own stop does not: on SIGTERM, 2.51 lets its gRPC streams stand still.

The server keeps some requests for ever, and their models with them (2.51): one whose gRPC stream the client
cancels while it ends, and one that gets an error while another step of it is in flight. Our client and our
steps avoid that where they can; others' clients may not. So it is enough as well that the gauges say nothing
runs and that, for a while, no process computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

ENTRANCES = ("fastserve_infer", "fastserve")
"""What clients call, in an order in which none needs one that was unloaded before."""
UNLOADED = "UNAVAILABLE"
QUIET_SECONDS = 1.5
QUIET_CPU = 0.05
"""Of one core: the server takes less to answer us, and more to read a prompt, on a busy machine too."""


class DrainedServer(Protocol):
    """What a drain asks of a server; `ServerProcess` is one."""

    def requests_in_flight(self) -> float | None:
        """Requests that wait or run, by the gauges; None: no answer now."""

    def unload(self, model: str) -> bool | None:
        """Asks for it. False: the server refuses; None: no answer now."""

    def work(self) -> tuple[float, int]:
        """Seconds of CPU and bytes read so far, of all its processes."""

    def model_state(self, model: str) -> str:
        """As Triton server's repository index names it; empty: no answer now."""


class Drain:
    """Of one server, in steps that do not wait for one another."""

    def __init__(
        self,
        server: DrainedServer,
        models: Sequence[str],
        stopping_file: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`models`: all of the repository; one that is not FastServe's is taken for what clients call."""
        self._server = server
        self._clock = clock
        entrances = [name for name in ENTRANCES if name in models]
        self._to_unload = entrances or list(models)
        self._has_gauges = bool(entrances)
        self._to_end: list[str] = []
        self._has_run_empty = False
        self._quiet_from: tuple[float, float] | None = None
        """Since when the gauges say that nothing runs, and the CPU seconds of then."""
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
        return not self._to_end or (self._has_gauges and self._is_quiet())

    def _is_quiet(self) -> bool:
        now = self._clock()
        if self._server.requests_in_flight() != 0:
            self._quiet_from = None
            return False
        if self._quiet_from is not None and now - self._quiet_from[0] < QUIET_SECONDS:
            return False
        before, self._quiet_from = self._quiet_from, (now, self._server.work()[0])
        if before is None:
            return False
        return self._quiet_from[1] - before[1] < QUIET_CPU * (now - before[0])
