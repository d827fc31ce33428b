"""One run of `tritonserver`: started, asked for its state, ended together with everything it started."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from fastserve.triton_server import tether
from fastserve.triton_server.installation import STUB
from fastserve.triton_server.start_checks import SHARED_MEMORY

REQUEST_SECONDS = 2.0
"""For the server to answer a question about its state."""
KILL_SECONDS = 10.0
"""For killed processes to be gone."""
NO_ANSWER = ""
"""In place of the state of a model."""
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""An address that means "all" cannot be connected to everywhere; the loopback address can."""


class ServerProcess:
    """A `tritonserver` with its stubs and their workers: one session, and so one process group."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        address: tuple[str, int],
        prefix: str,
    ) -> None:
        """Starts it. `address`: of its HTTP service; `prefix`: of its shared-memory regions."""
        host, self._port = address
        self._host = ANY_ADDRESS.get(host, host)
        self._prefix = prefix
        tethered = [sys.executable, "-I", tether.__file__, str(os.getpid()), *command]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                tethered,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._handle = psutil.Process(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> str | None:
        """How the server ended; None: it runs."""
        # Not Popen.poll: that reaps the process, after which another group could get its number.
        result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if result is None:
            return None
        if result.si_code == os.CLD_EXITED:
            return f"tritonserver ended with status {result.si_status}"
        return f"tritonserver was ended by {signal.Signals(result.si_status).name}"

    def stubs(self) -> dict[psutil.Process, str]:
        """The processes that run a Python model each, and the model's name."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self._handle.children():
                model = model_of(child)
                if model:
                    found[child] = model
        return found

    def is_ready(self) -> bool:
        """Whether the server says that it and all its models are ready."""
        try:
            return self._request("GET", "/v2/health/ready")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def model_state(self, model: str) -> str:
        """READY, LOADING, UNLOADING, UNAVAILABLE or NO_ANSWER."""
        try:
            status, body = self._request("POST", "/v2/repository/index")
        except (OSError, http.client.HTTPException):
            return NO_ANSWER
        models = json.loads(body) if status == 200 else []
        return next(
            (entry.get("state", "UNAVAILABLE") for entry in models if entry["name"] == model), NO_ANSWER
        )

    def terminate(self) -> None:
        """Asks the server to finish the requests in flight and to leave."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Ends the whole group at once and removes its shared memory."""
        members = self._members()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + KILL_SECONDS
        # A worker may hold a GPU's memory until it is really gone, and the next server needs that.
        while any(is_alive(member) for member in members) and time.monotonic() < deadline:
            time.sleep(0.01)
        for region in SHARED_MEMORY.glob(f"{self._prefix}*"):
            region.unlink(missing_ok=True)

    def _members(self) -> list[psutil.Process]:
        members = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) == self.pid:
                    members.append(process)
        return members

    def _request(self, method: str, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=REQUEST_SECONDS)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs. One that ended and that its parent has not asked about yet does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def model_of(process: psutil.Process) -> str | None:
    """The model that a stub runs: its command line is `.../STUB REPOSITORY/MODEL/VERSION/model.py ...`."""
    try:
        command = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None
    if len(command) > 1 and Path(command[0]).name == STUB:
        return Path(command[1]).parent.parent.name
    return None
