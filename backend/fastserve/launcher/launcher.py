"""Starts Triton server with FastServe's models and keeps it running. From a program:

with Server(Config(), ServerOptions(ports=free_ports())) as server:
    server.wait_ready(timeout=120)
    ...  # requests to server.http_url
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

from fastserve.cache_directory import cache_directory
from fastserve.config import Config
from fastserve.launcher.access_checks import check_access
from fastserve.launcher.ascii_paths import ascii_path
from fastserve.launcher.command_line import (
    SHARED_MEMORY_PER_MODEL,
    SHARED_MEMORY_REGIONS,
    Addresses,
    ServerOptions,
    check_server_flags,
    command_line,
    environment,
)
from fastserve.launcher.drain import Drain
from fastserve.launcher.encoder_repository import write_encoder_models
from fastserve.launcher.installation import server_installation
from fastserve.launcher.openai_process import OpenAIProcess
from fastserve.launcher.repository import compile_models, model_names, model_repository
from fastserve.launcher.run_directory import RunDirectory
from fastserve.launcher.server_log import new_log
from fastserve.launcher.server_process import ServerProcess
from fastserve.launcher.start_checks import (
    check_ports,
    check_shared_memory,
    free_ports,
    in_url,
    resolve,
)
from fastserve.launcher.supervisor import Restart, Supervisor
from fastserve.launcher.tls_relay import TlsRelay
from fastserve.start_error import StartError

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""An address that means "all" cannot be connected to everywhere; the loopback address can."""
OPENAI_START_SECONDS = 60.0
"""For OpenAI's API to take connections, counted from when the server is ready."""


def echo(line: str) -> None:
    """Where a server's messages go by default."""
    print(line, file=sys.stderr, flush=True)


class Server:
    """A Triton server that is kept running until `stop`.

    A thread of its own starts and supervises the server, and gives it a parent-death signal: when this
    process dies, however it dies, the server does too.
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
        self._relay: TlsRelay | None = None
        self.openai: OpenAIProcess | None = None
        """What offers OpenAI's API, where there is a port for it."""
        self._thread = threading.Thread(target=self._supervise, name="server")

    def start(self) -> None:
        """Checks everything that can be checked, then starts the server and returns. Raises StartError."""
        options = self.options
        repository = None if options.encoders_only else options.model_repository or model_repository()
        models = [encoder.name for encoder in options.encoders]
        if repository is not None:
            models += model_names(repository)
        check_server_flags(options.server_flags, bool(self.config.keys_file))
        check_access(self.config)
        self._address = resolve(options.host)
        self._metrics_address = resolve(options.metrics_host) if options.metrics_host else self._address
        check_ports(self._address, options.ports, self._metrics_address)
        self._http_address = (self._address, options.ports.http)
        if options.tls is not None:
            self._http_address = ("127.0.0.1", free_ports().http)
            context = options.tls.context()
        self.run_directory = RunDirectory()
        try:
            # After the run directory, whose making removes what dead runs hold of it.
            check_shared_memory(len(models) * SHARED_MEMORY_REGIONS * SHARED_MEMORY_PER_MODEL)
            self._prepare(repository, models)
            if options.tls is not None:
                self._relay = TlsRelay(self._listen(), context, self._http_address)
                self._relay.start()
        except BaseException:
            self.run_directory.remove()
            raise
        if self.openai is not None:
            self.openai.start()
        self._thread.start()

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        return socket.create_server((self._address, self.options.ports.http), family=family)

    def _prepare(self, repository: Path | None, models: list[str]) -> None:
        run = self.run_directory
        installation = server_installation(run, self.options.tritonserver)
        config_file, stopping_file = run.path / "config.json", run.path / "stopping"
        model = self.config.model
        if model and os.path.exists(model):
            model = ascii_path(run, "model", os.path.abspath(model))
        config_file.write_bytes(msgspec.json.encode(msgspec.structs.replace(self.config, model=model)))
        self._environment = environment(installation, run, config_file, stopping_file)
        repositories = []
        if repository is not None:
            compile_models(repository)
            repositories.append(run.link("models", repository))
        if self.options.encoders:
            repositories.append(write_encoder_models(run, self.options.encoders, self.config))
        http, http_port = self._http_address
        self._command = command_line(
            installation,
            self.options,
            Addresses(http, self._address, self._metrics_address, http_port),
            repositories,
            run.region_prefix,
            with_keys=bool(self.config.keys_file),
        )
        try:
            self._log = new_log(cache_directory() / "logs", run.path.name)
        except OSError as error:
            raise StartError(f"cannot write the server's log: {error}") from error
        if self.options.ports.openai:
            self.openai = OpenAIProcess(
                self._address,
                self.options.ports.openai,
                self.grpc_address,
                self.config.model,
                None if self.options.encoders_only else self.options.served_model_name,
                bool(self.config.keys_file),
                self.options.encoders,
                self._log.path,
                self._show,
            )
        self._supervisor = Supervisor(
            self._start_process,
            drain=lambda process: Drain(process, models, stopping_file),
            exit_timeout_seconds=self.options.exit_timeout_seconds,
            log=self._log,
            listener=self,
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
            if self.openai is not None:
                self.openai.wait_listening(OPENAI_START_SECONDS)
            return self._ready_after
        if self._has_ended:
            raise StartError("the server was stopped before it was ready")
        raise TimeoutError(f"the server was not ready after {timeout} s; its log: {self.log_path}")

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

    def request_shutdown(self) -> None:
        """Begins a graceful shutdown: requests in flight finish, new ones are refused. A second one kills.

        Returns at once, and may be called by a signal handler.
        """
        self._supervisor.request_shutdown()

    def join(self) -> None:
        """Waits until the server has ended. Raises StartError when it could not run any more."""
        self._thread.join()
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Stops the server and everything that it started, after the requests in flight."""
        self.request_shutdown()
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
        """Base URL of the HTTP service."""
        scheme = "http" if self.options.tls is None else "https"
        return f"{scheme}://{in_url(self._address_to_call)}:{self.options.ports.http}"

    @property
    def grpc_address(self) -> str:
        """Host and port, as `tritonclient.grpc` wants them."""
        return f"{in_url(self._address_to_call)}:{self.options.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        """URL of the metrics page."""
        return f"http://{in_url(self._metrics_address_to_call)}:{self.options.ports.metrics}/metrics"

    @property
    def log_path(self) -> Path:
        """Path of the log of the server and its models; it stays there when the server has ended."""
        return self._log.path

    @property
    def process(self) -> ServerProcess:
        """The server process that runs now. Raises StartError before `start`."""
        if self._process is None:
            raise StartError("the server has not been started: call start()")
        return self._process

    @property
    def _address_to_call(self) -> str:
        return ANY_ADDRESS.get(self._address, self._address)

    @property
    def _metrics_address_to_call(self) -> str:
        return ANY_ADDRESS.get(self._metrics_address, self._metrics_address)

    # The supervisor's listener, called in its thread.

    def ready(self, seconds: float) -> None:
        """Ends `wait_ready`."""
        with self._changed:
            self._ready_after = seconds
            self._changed.notify_all()

    def restarted(self, restart: Restart) -> None:
        """Counts the restart and says so."""
        self.show(f"FastServe is ready again after {restart.seconds:.1f} s")
        with self._changed:
            self.restarts.append(restart)
            self._changed.notify_all()

    def show(self, line: str) -> None:
        """Hands a line for the operator to the `show` that was given."""
        self._show(line)

    def _supervise(self) -> None:
        try:
            self._supervisor.run()
        except Exception as error:  # handed over to whoever waits
            self._failure = error
        finally:
            if self._relay is not None:
                self._relay.close()
            if self.openai is not None:
                self.openai.stop()
            self.run_directory.remove()
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _start_process(self) -> ServerProcess:
        http, http_port = self._http_address
        self._process = ServerProcess(
            self._command,
            self._environment,
            self._log.path,
            (ANY_ADDRESS.get(http, http), http_port),
            (self._metrics_address_to_call, self.options.ports.metrics),
            self.run_directory.region_prefix,
        )
        return self._process
