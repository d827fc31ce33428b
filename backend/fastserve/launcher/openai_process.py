"""The process that offers OpenAI's API beside the Triton server; it is kept running until `stop`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fastserve.encoders.served_encoder import ServedEncoder
from fastserve.launcher import parent_death_signal
from fastserve.start_error import StartError

POLL_SECONDS = 0.05
BACKOFF_SECONDS = 1.0
"""Before it is started again: it holds no state, so there is nothing else to wait for."""
STOP_SECONDS = 5.0
"""To end by itself; the requests in flight have ended with the Triton server by then."""
PROGRAM = "import sys; from fastserve.cli import main; sys.exit(main())"


class OpenAIProcess:
    """A thread starts the process, and again when it ends; the kernel ends it with that thread."""

    def __init__(
        self,
        host: str,
        port: int,
        grpc_address: str,
        model: str,
        model_name: str | None,
        has_keys: bool,
        encoders: Sequence[ServedEncoder],
        log: Path,
        show: Callable[[str], None],
    ) -> None:
        """`model`: the path; `model_name`: what requests call it, None where there are encoders alone;
        `has_keys`: whether there are keys."""
        self._address = (host, port)
        self._command = [sys.executable, "-c", PROGRAM, "openai", f"--url={grpc_address}", f"--host={host}"]
        self._command += [f"--port={port}"]
        if model_name is None:
            self._command += ["--encoders-only"]
        else:
            self._command += [f"--served-model-name={model_name}", f"--model={model}"]
        self._command += ["--has-keys"] if has_keys else []
        self._command += [f"--encoder={encoder.profile.task}={encoder.name}" for encoder in encoders]
        self._log, self._show = log, show
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep_running, name="openai")

    @property
    def pid(self) -> int | None:
        """The process that runs now, if any."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts it, and returns."""
        self._thread.start()

    def wait_listening(self, timeout: float) -> None:
        """Waits until it takes connections. Raises StartError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self._is_listening():
            if self._stopping.wait(POLL_SECONDS) or time.monotonic() > deadline:
                raise StartError(f"OpenAI's API does not answer; the log {self._log} may say why")

    def _is_listening(self) -> bool:
        try:
            socket.create_connection(self._address, timeout=1.0).close()
        except OSError:
            return False
        return True

    def _keep_running(self) -> None:
        while not self._stopping.is_set():
            self._process = process = self._start_process()
            while process.poll() is None and not self._stopping.wait(POLL_SECONDS):
                pass
            if self._stopping.is_set():
                break
            self._show(f"FastServe: OpenAI's API has ended with {process.returncode}; starting it anew")
            self._stopping.wait(BACKOFF_SECONDS)
        if self._process is not None:
            _end(self._process)

    def _start_process(self) -> subprocess.Popen[bytes]:
        with_signal = [sys.executable, "-I", parent_death_signal.__file__, str(os.getpid())]
        with self._log.open("ab") as output:
            return subprocess.Popen(
                with_signal + self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ends the process; again, it does nothing."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
