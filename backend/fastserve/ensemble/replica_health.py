"""Whether the engine's replicas can serve: the server is ready as long as one of them can."""

from __future__ import annotations

import logging
import threading

from fastserve.ensemble.readiness import Readiness

logger = logging.getLogger(__name__)


class ReplicaHealth:
    """What is wrong with each replica, from any thread."""

    def __init__(self, num_replicas: int, readiness: Readiness) -> None:
        self._problems: list[dict[str, str]] = [{} for _ in range(num_replicas)]
        """Of each replica, by source."""
        self._readiness = readiness
        self._lock = threading.Lock()

    def set(self, replica: int, source: str, problem: str | None) -> None:
        """Sets what is wrong with `source` of a replica, as a sentence; None: nothing any more."""
        with self._lock:
            problems = self._problems[replica]
            if problem is None:
                problems.pop(source, None)
            else:
                problems[source] = problem
                logger.error("replica %d of %d cannot serve: %s", replica, len(self._problems), problem)
            failing = [next(iter(each.values())) for each in self._problems if each]
            is_any_left = len(failing) < len(self._problems)
            self._readiness.set("replicas", None if is_any_left else "; ".join(failing))
