"""Starts Triton server with FastServe's models, watches it, starts it anew when a part of it dies.

with Server(Config(), ports=free_ports()) as server:
    server.wait_ready(timeout=120)
    ...  # requests to server.http_url
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec

from fastserve.config import Config
from fastserve.triton_server.command_line import (
    SHARED_MEMORY_PER_MODEL,
    SHARED_MEMORY_REGIONS,
    ServerOptions,
    command_line,
    environment,
)
from fastserve.triton_server.downloads import cache_directory
from fastserve.triton_server.installation import server_installation
from fastserve.triton_server.repository import model_names, model_repository
from fastserve.triton_server.server_log import ServerLog, worth_showing
from fastserve.triton_server.server_process import ANY_ADDRESS, ServerProcess
from fastserve.triton_server.start_checks import check_ports, check_shared_memory
from fastserve.triton_server.start_error import StartError
from fastserve.triton_server.watch import Watch

POLL_SECONDS = 0.1
EXIT_GRACE_SECONDS = 5.0
"""For the server to leave after its exit timeout, before it is killed."""
START_LOSS_SECONDS = 5.0
"""A stub that ends while models load makes the server leave by itself; it has so long to do it."""
SHORT_LIFE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 16.0
STARTS_TRIED = 5
"""In a row without getting ready, before the launcher gives up."""
LOG_LINES_SHOWN = 20


@dataclass(frozen=True)
class Restart:
    """The server was started anew."""

    reason: str
    seconds: float
    """From the loss to the moment when all models were ready again."""


def echo(line: str) -> None:
    """Where a server's messages go by default."""
    print(line, file=sys.stderr, flush=True)


class Server:
    """A Triton server that is kept running until `stop`.

    A thread of its own starts the server and watches it. The thread also ties the server's life to this
    process: when this process dies, however it dies, the server does too.
    """

    def __init__(
        self, config: Config, options: ServerOptions | None = None, show: Callable[[str], None] = echo
    ) -> None:
        self.config = config
        self.options = options or ServerOptions()
        self.restarts: list[Restart] = []
        self._show = show
        self._stops_asked = 0
        self._failure: StartError | None = None
        self._ready_after: float | None = None
        self._has_ended = False
        self._changed = threading.Condition()
        self._process: ServerProcess | None = None
        self._thread = threading.Thread(target=self._keep_running, name="server")

    # What the caller does.

    def start(self) -> None:
        """Checks everything that can be checked, then starts the server and returns. Raises StartError."""
        options = self.options
        repository = options.model_repository or model_repository()
        models = model_names(repository)
        check_ports(options.host, options.ports)
        check_shared_memory(len(models) * SHARED_MEMORY_REGIONS * SHARED_MEMORY_PER_MODEL)
        cache_directory().mkdir(parents=True, exist_ok=True)
        self.run_directory = Path(tempfile.mkdtemp(prefix="run-", dir=cache_directory()))
        try:
            self._prepare(repository)
        except StartError:
            shutil.rmtree(self.run_directory)
            raise
        self._thread.start()

    def _prepare(self, repository: Path) -> None:
        installation = server_installation(self.run_directory, self.options.tritonserver)
        config_file = self.run_directory / "config.json"
        config_file.write_bytes(msgspec.json.encode(self.config))
        self._environment = environment(installation, config_file)
        self._shared_memory_prefix = f"fastserve_{uuid.uuid4().hex[:8]}_"
        self._command = command_line(installation, self.options, repository, self._shared_memory_prefix)
        self._log = ServerLog(self.run_directory / "server.log")
        self._log.path.touch()

    def wait_ready(self, timeout: float | None = None) -> float:
        """Waits until the server is ready for the first time, and returns the seconds it took.

        Raises StartError when it cannot run or was stopped, TimeoutError after `timeout` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready_after is not None or self._has_ended, timeout)
        if self._failure:
            raise self._failure
        if self._has_ended:
            raise StartError("the server was stopped before it was ready: start it again")
        if self._ready_after is None:
            raise TimeoutError(f"the server was not ready after {timeout} s; its log: {self._log.path}")
        return self._ready_after

    def wait_restarts(self, count: int, timeout: float) -> None:
        """Waits until the server has been started anew `count` times. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.restarts) >= count, timeout):
                raise TimeoutError(f"{len(self.restarts)} restarts after {timeout} s, {count} were expected")

    def ask_stop(self) -> None:
        """Asks the server to finish what is in flight and to leave; asked again, it is killed.

        Returns at once, and may be called by a signal handler.
        """
        self._stops_asked += 1

    def join(self) -> None:
        """Waits until the server has ended. Raises StartError when it ended because it could not run."""
        self._thread.join()
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Stops the server and everything that it started, after the requests in flight."""
        self.ask_stop()
        self._thread.join()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def http_url(self) -> str:
        return f"http://{self._host_to_call}:{self.options.ports.http}"

    @property
    def grpc_address(self) -> str:
        """Host and port, as `tritonclient.grpc` wants them."""
        return f"{self._host_to_call}:{self.options.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._host_to_call}:{self.options.ports.metrics}/metrics"

    @property
    def process(self) -> ServerProcess:
        """The server that runs now."""
        if self._process is None:
            raise StartError("the server has not been started: call start()")
        return self._process

    @property
    def _host_to_call(self) -> str:
        host = ANY_ADDRESS.get(self.options.host, self.options.host)
        return f"[{host}]" if ":" in host else host

    # What the thread does.

    def _keep_running(self) -> None:
        try:
            self._run_until_stopped()
        except StartError as error:
            self._failure = error
        finally:
            if self._failure is None:
                shutil.rmtree(self.run_directory)
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _run_until_stopped(self) -> None:
        lost_at = time.monotonic()
        reason = ""
        failed_starts = short_lives = 0
        while not self._stops_asked:
            self._start_process()
            loss = self._wait_until_ready()
            if loss is None:
                failed_starts = 0
                ready_at = time.monotonic()
                self._announce_ready(reason, ready_at - lost_at)
                loss = self._wait_until_lost()
                short_lives = short_lives + 1 if time.monotonic() - ready_at < SHORT_LIFE_SECONDS else 0
            else:
                failed_starts += 1
            if self._stops_asked:
                break
            lost_at, reason = time.monotonic(), loss or ""
            self._end_lost_process(
                reason, tries_left=self._ready_after is not None and failed_starts < STARTS_TRIED
            )
            self._pause(max(failed_starts, short_lives))
        self._stop_process()

    def _start_process(self) -> None:
        address = (self.options.host, self.options.ports.http)
        self._process = ServerProcess(
            self._command, self._environment, self._log.path, address, self._shared_memory_prefix
        )
        self._watch = Watch(self._process)

    def _wait_until_ready(self) -> str | None:
        """Returns None when the server is ready or shall stop, else what has died."""
        stub_lost_at = None
        while not self._stops_asked:
            self._show_log()
            loss = self._watch.loss()
            if loss and stub_lost_at is None:
                stub_lost_at = time.monotonic()
            if self.process.end():
                return self.process.end()
            if stub_lost_at and time.monotonic() - stub_lost_at > START_LOSS_SECONDS:
                return loss or "a model's process ended while it loaded"
            if self.process.is_ready():
                self._watch.search()
                return None
            time.sleep(POLL_SECONDS)
        return None

    def _wait_until_lost(self) -> str | None:
        """Returns None when the server shall stop, else what has died."""
        while not self._stops_asked:
            self._show_log()
            loss = self._watch.loss()
            if loss:
                return loss
            time.sleep(POLL_SECONDS)
        return None

    def _announce_ready(self, reason: str, seconds: float) -> None:
        if self._stops_asked:
            return
        with self._changed:
            if self._ready_after is None:
                self._ready_after = seconds
            else:
                self.restarts.append(Restart(reason, seconds))
                self._show(f"FastServe is ready again after {seconds:.1f} s")
            self._changed.notify_all()

    def _end_lost_process(self, reason: str, tries_left: bool) -> None:
        """Kills what is left of the server. Raises StartError when it shall not be tried again."""
        self.process.kill()
        self._show_log()
        if tries_left:
            self._show(f"FastServe: {reason}; starting the server anew")
            return
        lines = "\n".join(self._log.last_lines(LOG_LINES_SHOWN))
        raise StartError(
            f"the server cannot run: {reason}; the last lines of {self._log.path} say why:\n{lines}"
        )

    def _pause(self, failures: int) -> None:
        """Between starts: nothing after the first failure, then 1, 2, 4 ... seconds."""
        seconds = min(2.0 ** (failures - 2), LONGEST_PAUSE_SECONDS) if failures > 1 else 0.0
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stops_asked:
            time.sleep(POLL_SECONDS)

    def _stop_process(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        deadline = time.monotonic() + self.options.exit_timeout_seconds + EXIT_GRACE_SECONDS
        while self._process.end() is None and self._stops_asked < 2 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        # Also when it left by itself: nothing that it started may outlive it.
        self._process.kill()
        self._show_log()

    def _show_log(self) -> None:
        for line in self._log.new_lines():
            if self.options.log_verbose or worth_showing(line):
                self._show(line)
