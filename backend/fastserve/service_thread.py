"""A thread that serves requests for as long as its process lives, and says so when it cannot."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

FAILURES_TO_BE_UNWELL = 5
"""In a row, after which a thread is reported as unwell; a single one may be the fault of one request."""
MAX_PAUSE_SECONDS = 1.0
"""After a failure; the first pause is a hundredth of it, and each is twice the one before."""


def _nothing(*arguments: object) -> None:
    return


class ServiceThread:
    """Does one piece of work after the other. One that raises is logged and reported; the next one follows.

    `work` waits for a piece and does it; it returns False when there will be no more. `on_failure` gets the
    exception, and fails the requests that were hurt. `on_health` is told what is wrong, as a sentence, when
    the thread keeps failing or has ended without being asked to, and None when it works again. All three are
    called in this thread.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], bool],
        on_failure: Callable[[Exception], None] = _nothing,
        on_health: Callable[[str | None], None] = _nothing,
    ) -> None:
        self._name = name
        self._work = work
        self._on_failure = on_failure
        self._on_health = on_health
        self._failures = 0
        """In a row."""
        self._is_unwell = False
        """As was reported."""
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def hurry(self) -> None:
        """Ends the pauses after failures: the process is about to leave."""
        self._hurry.set()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end, which `work` decides; returns at once in the thread itself."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        is_done = False
        try:
            while not is_done:
                is_done = not self._attempt()
        finally:
            if not is_done:
                self._report(f"the thread `{self._name}` has ended")

    def _attempt(self) -> bool:
        try:
            goes_on = self._work()
        except Exception as error:
            logger.exception("the thread `%s` failed and goes on", self._name)
            self._failed(error)
            return True
        self._failures = 0
        if self._is_unwell:
            self._is_unwell = not self._report(None)
        return goes_on

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        try:
            self._on_failure(error)
        except Exception:
            logger.exception("the thread `%s` could not fail its requests", self._name)
        if self._failures >= FAILURES_TO_BE_UNWELL and not self._is_unwell:
            problem = f"the thread `{self._name}` keeps failing: {type(error).__name__}: {error}"
            self._is_unwell = self._report(problem)
        self._hurry.wait(min(1.0, 0.01 * 2 ** min(self._failures - 1, 10)) * MAX_PAUSE_SECONDS)

    def _report(self, problem: str | None) -> bool:
        """Whether it could be said; if not, it is said after the next piece."""
        try:
            self._on_health(problem)
        except Exception:
            logger.exception("the thread `%s` could not say how it is", self._name)
            return False
        return True
