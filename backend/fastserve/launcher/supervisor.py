"""Keeps a server running: starts it, waits until it is ready, starts it anew when a part of it dies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fastserve.launcher.drain import Drain
from fastserve.launcher.health_monitor import HealthMonitor
from fastserve.launcher.server_log import ServerLog, is_notable
from fastserve.launcher.server_process import ServerProcess
from fastserve.launcher.stall_detector import STALL_SECONDS, StallDetector
from fastserve.start_error import StartError

POLL_SECONDS = 0.1
TERM_GRACE_SECONDS = 1.2
"""Between SIGTERM, to a server that has nothing in flight, and SIGKILL."""
EARLY_FAILURE_SECONDS = 5.0
"""A server that dies so soon after it was ready is started again after a back-off."""
MAX_BACKOFF_SECONDS = 16.0
MAX_FAILED_STARTS = 5
"""In a row, after which the supervisor gives up."""
LOG_LINES_SHOWN = 20


@dataclass(frozen=True)
class Restart:
    """The server was started anew."""

    reason: str
    seconds: float
    """From the failure to the moment when all models were ready again."""


class Listener(Protocol):
    """Hears what happens, in the supervisor's thread."""

    def ready(self, seconds: float) -> None:
        """For the first time, so long after the start."""

    def restarted(self, restart: Restart) -> None:
        """The server is ready again."""

    def show(self, line: str) -> None:
        """A line for the operator."""


class Supervisor:
    """Runs the server, and again when it fails. The server dies with the thread in which `run` is."""

    def __init__(
        self,
        start: Callable[[], ServerProcess],
        drain: Callable[[ServerProcess], Drain],
        exit_timeout_seconds: float,
        log: ServerLog,
        listener: Listener,
        show_all: bool = False,
    ) -> None:
        """`drain` begins the drain of a server, which has `exit_timeout_seconds`.

        `show_all`: every line of the log is shown, not only warnings and errors.
        """
        self._start, self._begin_drain = start, drain
        self._exit_timeout_seconds = exit_timeout_seconds
        self._log, self._listener, self._show_all = log, listener, show_all
        self._shutdown_requests = 0
        self._has_been_ready = False
        self._is_ready = False
        """Whether the server that runs now has been ready; one that has not has accepted nothing."""

    def request_shutdown(self) -> None:
        """Begins a graceful shutdown: `run` drains the server and returns. A second request kills it."""
        # A plain number, no lock: a signal handler may call this in the middle of anything.
        self._shutdown_requests += 1

    def run(self) -> None:
        """Returns when the server has been stopped. Raises StartError when it cannot run."""
        failure: str | None = None
        since = time.monotonic()
        failed_starts = early_failures = 0
        while not self._shutdown_requests:
            process, self._is_ready = self._start(), False
            monitor = HealthMonitor(process)
            next_failure = self._wait_until_ready(process, monitor)
            if next_failure:
                failed_starts += 1
            else:
                failed_starts = 0
                ready_at = time.monotonic()
                self._report_ready(failure, ready_at - since)
                next_failure = self._wait_until_failed(monitor)
                early_failures = (
                    early_failures + 1 if time.monotonic() - ready_at < EARLY_FAILURE_SECONDS else 0
                )
            if next_failure is None:
                self._stop(process, monitor)
                return
            failure, since = next_failure, time.monotonic()
            self._kill_failed(
                process, failure, try_again=self._has_been_ready and failed_starts < MAX_FAILED_STARTS
            )
            self._sleep(restart_backoff(max(failed_starts, early_failures)))

    def _wait_until_ready(self, process: ServerProcess, monitor: HealthMonitor) -> str | None:
        """Returns None when the server is ready or shall stop, else what failed."""
        detector = StallDetector(process.resource_usage, self._log.size)
        while not self._shutdown_requests:
            self._show_log()
            failure = monitor.failure()
            if failure:
                return failure
            if process.is_ready():
                self._is_ready = True
                monitor.discover_stubs()
                return None
            if detector.stalled_seconds() > STALL_SECONDS:
                return f"tritonserver does not get ready, and has done nothing for {STALL_SECONDS:.0f} s"
            time.sleep(POLL_SECONDS)
        return None

    def _wait_until_failed(self, monitor: HealthMonitor) -> str | None:
        """Returns None when the server shall stop, else what failed."""
        while not self._shutdown_requests:
            self._show_log()
            failure = monitor.failure()
            if failure:
                return failure
            time.sleep(POLL_SECONDS)
        return None

    def _report_ready(self, failure: str | None, seconds: float) -> None:
        if self._shutdown_requests:
            return
        if failure is None or not self._has_been_ready:
            self._has_been_ready = True
            self._listener.ready(seconds)
        else:
            self._listener.restarted(Restart(failure, seconds))

    def _kill_failed(self, process: ServerProcess, failure: str, try_again: bool) -> None:
        """Kills what is left of a failed server. Raises StartError when it shall not be started again."""
        process.kill()
        self._show_log()
        if not try_again:
            lines = "\n".join(self._log.last_lines(LOG_LINES_SHOWN))
            raise StartError(
                f"the server cannot run: {failure}; the last lines of {self._log.path} say why:\n{lines}"
            )
        self._listener.show(f"FastServe: {failure}; starting the server anew")

    def _stop(self, process: ServerProcess, monitor: HealthMonitor) -> None:
        if self._is_ready:
            self._listener.show(
                f"FastServe: stopping; requests in flight have {self._exit_timeout_seconds:.0f} s to finish"
            )
            if self._drain(process, monitor):
                process.terminate()
                self._wait_for(lambda: process.exit_reason() is not None, TERM_GRACE_SECONDS)
        # Also when it left by itself: nothing that it started may outlive it.
        process.kill()
        self._show_log()

    def _drain(self, process: ServerProcess, monitor: HealthMonitor) -> bool:
        """Waits until nothing is in flight. False: the time is over, or what was in flight is lost."""
        drain = self._begin_drain(process)
        failures: list[str] = []

        def is_over() -> bool:
            self._show_log()
            failures.extend(filter(None, [monitor.failure()]))
            return bool(failures) or drain.is_done()

        is_in_time = self._wait_for(is_over, self._exit_timeout_seconds)
        if failures:
            self._listener.show(f"FastServe: {failures[0]}; what was in flight is lost")
        elif not is_in_time and self._shutdown_requests < 2:
            self._listener.show(
                f"FastServe: requests that had not finished after {self._exit_timeout_seconds:.0f} s are lost"
            )
        return is_in_time and not failures

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether the condition came true in time, and before a stop was asked for again."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self._shutdown_requests >= 2 or time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._shutdown_requests:
            time.sleep(POLL_SECONDS)

    def _show_log(self) -> None:
        for line in self._log.new_lines():
            if self._show_all or is_notable(line):
                self._listener.show(line)


def restart_backoff(failures: int) -> float:
    """Seconds before the next start: 0 after the first failure in a row, then 1, 2, 4 and so on."""
    return min(2.0 ** (failures - 2), MAX_BACKOFF_SECONDS) if failures > 1 else 0.0
