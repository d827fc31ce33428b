"""Keeps a server running: starts it, waits until it is ready, starts it anew when a part of it dies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastserve.launcher.drain import Drain
from fastserve.launcher.health_monitor import HealthMonitor
from fastserve.launcher.progress import STALL_SECONDS, Progress
from fastserve.launcher.server_log import ServerLog, worth_showing
from fastserve.launcher.server_process import ServerProcess
from fastserve.start_error import StartError

POLL_SECONDS = 0.1
LEAVE_SECONDS = 1.2
"""For a server that has nothing in flight to leave by itself, before it is killed."""
SHORT_LIFE_SECONDS = 5.0
"""A server that dies so soon after it was ready is started again after a pause."""
LONGEST_PAUSE_SECONDS = 16.0
STARTS_TRIED = 5
"""In a row without getting ready, before the supervisor gives up."""
LOG_LINES_SHOWN = 20


@dataclass(frozen=True)
class Restart:
    """The server was started anew."""

    reason: str
    seconds: float
    """From the loss to the moment when all models were ready again."""


class Listener(Protocol):
    """Who is told what happens; called in the supervisor's thread."""

    def ready(self, seconds: float) -> None:
        """For the first time, so long after the start."""

    def restarted(self, restart: Restart) -> None:
        """The server is ready again."""

    def show(self, line: str) -> None:
        """A line for the operator."""


class Supervisor:
    """Over one run of the server after another. The server dies with the thread in which `run` is."""

    def __init__(
        self,
        start: Callable[[], ServerProcess],
        log: ServerLog,
        listener: Listener,
        exit_timeout_seconds: float,
        models: Sequence[str],
        stopping_file: Path,
        show_all: bool = False,
    ) -> None:
        """`models` and `stopping_file` are for the `Drain`, which has `exit_timeout_seconds`.

        `show_all`: every line of the log is shown, not only warnings and errors.
        """
        self._start = start
        self._log = log
        self._listener = listener
        self._exit_timeout_seconds = exit_timeout_seconds
        self._models = models
        self._stopping_file = stopping_file
        self._show_all = show_all
        self._stops_asked = 0
        self._has_been_ready = False
        self._is_ready = False
        """The server that runs now: one that is not has accepted nothing."""

    def ask_stop(self) -> None:
        """Makes `run` drain the server, stop it and return; asked again, the server is killed."""
        # A plain number, no lock: a signal handler may call this in the middle of anything.
        self._stops_asked += 1

    def run(self) -> None:
        """Returns when the server has been stopped. Raises StartError when it cannot run."""
        loss: str | None = None
        since = time.monotonic()
        failed_starts = short_lives = 0
        while not self._stops_asked:
            process, self._is_ready = self._start(), False
            monitor = HealthMonitor(process)
            next_loss = self._wait_until_ready(process, monitor)
            if next_loss:
                failed_starts += 1
            else:
                failed_starts = 0
                ready_at = time.monotonic()
                self._tell_ready(loss, ready_at - since)
                next_loss = self._wait_until_lost(monitor)
                short_lives = short_lives + 1 if time.monotonic() - ready_at < SHORT_LIFE_SECONDS else 0
            if next_loss is None:
                self._stop(process, monitor)
                return
            loss, since = next_loss, time.monotonic()
            self._end_lost(process, loss, try_again=self._has_been_ready and failed_starts < STARTS_TRIED)
            self._sleep(pause_after(max(failed_starts, short_lives)))

    def _wait_until_ready(self, process: ServerProcess, monitor: HealthMonitor) -> str | None:
        """Returns None when the server is ready or shall stop, else what has died."""
        progress = Progress(process.work, self._log.size)
        while not self._stops_asked:
            self._show_log()
            loss = monitor.loss()
            if loss:
                return loss
            if process.is_ready():
                self._is_ready = True
                monitor.search()
                return None
            if progress.seconds_without() > STALL_SECONDS:
                return f"tritonserver does not get ready, and has done nothing for {STALL_SECONDS:.0f} s"
            time.sleep(POLL_SECONDS)
        return None

    def _wait_until_lost(self, monitor: HealthMonitor) -> str | None:
        """Returns None when the server shall stop, else what has died."""
        while not self._stops_asked:
            self._show_log()
            loss = monitor.loss()
            if loss:
                return loss
            time.sleep(POLL_SECONDS)
        return None

    def _tell_ready(self, loss: str | None, seconds: float) -> None:
        if self._stops_asked:
            return
        if loss is None or not self._has_been_ready:
            self._has_been_ready = True
            self._listener.ready(seconds)
        else:
            self._listener.restarted(Restart(loss, seconds))

    def _end_lost(self, process: ServerProcess, loss: str, try_again: bool) -> None:
        """Kills what is left of the server. Raises StartError when it shall not be started again."""
        process.kill()
        self._show_log()
        if not try_again:
            lines = "\n".join(self._log.last_lines(LOG_LINES_SHOWN))
            raise StartError(
                f"the server cannot run: {loss}; the last lines of {self._log.path} say why:\n{lines}"
            )
        self._listener.show(f"FastServe: {loss}; starting the server anew")

    def _stop(self, process: ServerProcess, monitor: HealthMonitor) -> None:
        if self._is_ready:
            self._listener.show(
                f"FastServe: stopping; requests in flight have {self._exit_timeout_seconds:.0f} s to finish"
            )
            if self._drain(process, monitor):
                process.terminate()
                self._wait_stop(lambda: process.end() is not None, LEAVE_SECONDS)
        # Also when it left by itself: nothing that it started may outlive it.
        process.kill()
        self._show_log()

    def _drain(self, process: ServerProcess, monitor: HealthMonitor) -> bool:
        """Waits until nothing is in flight. False: the time is over, or what was in flight is lost."""
        drain = Drain(process, self._models, self._stopping_file)
        losses: list[str] = []

        def is_over() -> bool:
            self._show_log()
            losses.extend(filter(None, [monitor.loss()]))
            return bool(losses) or drain.is_done()

        is_in_time = self._wait_stop(is_over, self._exit_timeout_seconds)
        if losses:
            self._listener.show(f"FastServe: {losses[0]}; what was in flight is lost")
        elif not is_in_time and self._stops_asked < 2:
            self._listener.show(
                f"FastServe: requests that had not finished after {self._exit_timeout_seconds:.0f} s are lost"
            )
        return is_in_time and not losses

    def _wait_stop(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether the condition came true in time, and before a stop was asked for again."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self._stops_asked >= 2 or time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stops_asked:
            time.sleep(POLL_SECONDS)

    def _show_log(self) -> None:
        for line in self._log.new_lines():
            if self._show_all or worth_showing(line):
                self._listener.show(line)


def pause_after(failures: int) -> float:
    """Seconds before the next start: none after the first failure in a row, then 1, 2, 4 ..."""
    return min(2.0 ** (failures - 2), LONGEST_PAUSE_SECONDS) if failures > 1 else 0.0
