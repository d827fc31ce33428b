"""A thread that serves requests for as long as its process lives, and reports when it cannot."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

UNHEALTHY_AFTER_FAILURES = 5
"""In a row; a single one may be the fault of one request."""
MAX_BACKOFF_SECONDS = 1.0
"""After a failure; the first backoff is a hundredth of it, and each is twice the one before."""


def _nothing(*arguments: object) -> None:
    return


class ServiceThread:
    """A loop over pieces of work. A piece that raises is logged and reported; the next one follows.

    `work` waits for a piece and does it; it returns False when there will be no more. `on_failure` gets the
    exception, and fails the requests that were hurt. `on_health` gets what is wrong, as a sentence, when the
    thread keeps failing or has ended without being asked to, and None when it works again. All three are
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
        self._is_unhealthy = False
        """As was reported."""
        self._joining = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread, a daemon."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it has started and has not ended."""
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end, which `work` decides, and ends the backoff after failures.

        Returns at once in the thread itself. `timeout`: seconds; None: no limit.
        """
        self._joining.set()
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
            has_more = self._work()
        except Exception as error:
            logger.exception("the thread `%s` failed and goes on", self._name)
            self._failed(error)
            return True
        self._failures = 0
        if self._is_unhealthy:
            self._is_unhealthy = not self._report(None)
        return has_more

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        try:
            self._on_failure(error)
        except Exception:
            logger.exception("the thread `%s` could not fail its requests", self._name)
        if self._failures >= UNHEALTHY_AFTER_FAILURES and not self._is_unhealthy:
            problem = f"the thread `{self._name}` keeps failing: {type(error).__name__}: {error}"
            self._is_unhealthy = self._report(problem)
        self._joining.wait(min(1.0, 0.01 * 2 ** min(self._failures - 1, 10)) * MAX_BACKOFF_SECONDS)

    def _report(self, problem: str | None) -> bool:
        """Whether it could be reported; if not, it is reported after the next piece."""
        try:
            self._on_health(problem)
        except Exception:
            logger.exception("the thread `%s` could not report its health", self._name)
            return False
        return True
