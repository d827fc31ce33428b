"""Lets a server finish what it has accepted, before it is ended.

New requests are refused by `preprocess`, until FastServe's gauges say that nothing waits or runs. Then the
models that clients call are unloaded, which leaves the requests in them running: when they are unloaded,
nothing is in flight. Triton server's own stop does not: on SIGTERM, 2.51 lets its gRPC streams stand still.

The server keeps some requests for ever, and their models with them (2.51): some that were cancelled, and some
that got an error while another model worked on them. Our client and our models avoid that where they can;
others' clients may not. So it is enough as well that the gauges say nothing runs and that, for IDLE_SECONDS,
no process computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

ENTRY_POINTS = ("fastserve_infer", "fastserve")
"""Models that clients call, in an order in which none needs one that was unloaded before."""
INTERNAL = ("preprocess", "scheduler", "engine", "postprocess", "readiness")
"""Models that no client calls, beside those."""
UNLOADED = "UNAVAILABLE"
IDLE_SECONDS = 1.5
IDLE_CPU = 0.05
"""Share of one core: the server takes less to answer us, and more to read a prompt, on a busy machine too."""


class DrainedServer(Protocol):
    """What a drain asks of a server; `ServerProcess` is one."""

    def requests_in_flight(self) -> float | None:
        """Requests that wait or run, by the gauges; None: no answer now."""

    def unload(self, model: str) -> bool | None:
        """Asks the server to unload a model. False: it refuses; None: no answer now."""

    def resource_usage(self) -> tuple[float, int]:
        """Seconds of CPU and bytes read so far, of all its processes."""

    def model_state(self, model: str) -> str:
        """The state in Triton server's repository index; empty: no answer now."""


class Drain:
    """The drain of one server, in steps that never block."""

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
        entry_points = [name for name in ENTRY_POINTS if name in models]
        others = [name for name in models if name not in (*ENTRY_POINTS, *INTERNAL)]
        self._to_unload = entry_points + others if entry_points else list(models)
        self._has_gauges = bool(entry_points)
        self._to_end: list[str] = []
        self._reached_zero = False
        self._may_unload = False
        self._idle_since: tuple[float, float] | None = None
        """Since when the gauges say that nothing runs, and the CPU seconds of then."""
        stopping_file.touch()

    def is_done(self) -> bool:
        """Takes the next step that can be taken; returns whether nothing is in flight any more."""
        if not self._reached_zero and self._server.requests_in_flight() != 0:
            return False
        self._reached_zero = True
        while self._to_unload:
            unloads = self._server.unload(self._to_unload[0])
            if unloads is None:
                return False
            model = self._to_unload.pop(0)
            if unloads:
                self._to_end.append(model)
                self._may_unload = True
        if not self._may_unload:  # with keys nobody may
            return self._is_idle()
        self._to_end = [name for name in self._to_end if self._server.model_state(name) != UNLOADED]
        return not self._to_end or (self._has_gauges and self._is_idle())

    def _is_idle(self) -> bool:
        now = self._clock()
        if self._server.requests_in_flight() != 0:
            self._idle_since = None
            return False
        if self._idle_since is not None and now - self._idle_since[0] < IDLE_SECONDS:
            return False
        before, self._idle_since = self._idle_since, (now, self._server.resource_usage()[0])
        if before is None:
            return False
        return self._idle_since[1] - before[1] < IDLE_CPU * (now - before[0])
