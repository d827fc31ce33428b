"""Starts Triton server with FastServe's models and keeps it running. From a program:

with Server(Config(), ServerOptions(ports=free_ports())) as server:
    server.wait_ready(timeout=120)
    ...  # requests to server.http_url
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
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
from fastserve.triton_server.server_log import ServerLog
from fastserve.triton_server.server_process import ANY_ADDRESS, ServerProcess
from fastserve.triton_server.start_checks import check_ports, check_shared_memory
from fastserve.triton_server.start_error import StartError
from fastserve.triton_server.supervisor import Restart, Supervisor


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
        self._changed = threading.Condition()
        self._ready_after: float | None = None
        self._has_ended = False
        self._failure: Exception | None = None
        self._process: ServerProcess | None = None
        self._thread = threading.Thread(target=self._supervise, name="server")

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
        self._supervisor = Supervisor(
            self._start_process,
            self._log,
            listener=self,
            exit_timeout_seconds=self.options.exit_timeout_seconds,
            show_all=self.options.log_verbose > 0,
        )

    def wait_ready(self, timeout: float | None = None) -> float:
        """Waits until the server is ready for the first time, and returns the seconds it took.

        Raises StartError when it cannot run or was stopped, TimeoutError after `timeout` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready_after is not None or self._has_ended, timeout)
        if self._failure:
            raise self._failure
        if self._ready_after is not None:
            return self._ready_after
        if self._has_ended:
            raise StartError("the server was stopped before it was ready")
        raise TimeoutError(f"the server was not ready after {timeout} s; its log: {self._log.path}")

    def wait_restarts(self, count: int, timeout: float) -> None:
        """Waits until the server has been started anew `count` times.

        Raises StartError when it cannot run any more, TimeoutError after `timeout` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self.restarts) >= count or self._has_ended, timeout)
        if self._failure:
            raise self._failure
        if len(self.restarts) < count:
            raise TimeoutError(f"{len(self.restarts)} restarts after {timeout} s, {count} were expected")

    def ask_stop(self) -> None:
        """Asks the server to finish what is in flight and to leave; asked again, it is killed.

        Returns at once, and may be called by a signal handler.
        """
        self._supervisor.ask_stop()

    def join(self) -> None:
        """Waits until the server has ended. Raises StartError when it could not run any more."""
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

    # What the supervisor tells, in its thread.

    def ready(self, seconds: float) -> None:
        with self._changed:
            self._ready_after = seconds
            self._changed.notify_all()

    def restarted(self, restart: Restart) -> None:
        self.show(f"FastServe is ready again after {restart.seconds:.1f} s")
        with self._changed:
            self.restarts.append(restart)
            self._changed.notify_all()

    def show(self, line: str) -> None:
        self._show(line)

    def _supervise(self) -> None:
        try:
            self._supervisor.run()
        except Exception as error:  # handed over to whoever waits
            self._failure = error
        else:
            shutil.rmtree(self.run_directory)
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _start_process(self) -> ServerProcess:
        address = (self.options.host, self.options.ports.http)
        self._process = ServerProcess(
            self._command, self._environment, self._log.path, address, self._shared_memory_prefix
        )
        return self._process
