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

from fastserve.launcher import parent_death_signal
from fastserve.launcher.installation import STUB
from fastserve.launcher.run_directory import remove_regions

REQUEST_SECONDS = 5.0
"""For the server to answer a question about its state; it is asked again then."""
REQUEST_ERRORS = (OSError, http.client.HTTPException)
KILL_SECONDS = 10.0
"""Time for killed processes to be gone."""
NO_ANSWER = ""
"""Stands for the state of a model when the server does not tell it."""
NOT_READY = "NOT READY"
"""Any state but READY, where no more is told."""
IN_FLIGHT = ("fastserve_requests_waiting", "fastserve_requests_running", "fastserve_requests_preempted")
"""Prefixes of the gauges that count requests."""


class ServerProcess:
    """A `tritonserver` with its stubs and their workers: one session, and so one process group."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        address: tuple[str, int],
        metrics_address: tuple[str, int],
        prefix: str,
    ) -> None:
        """Starts it. `address`: to call its HTTP service at; `prefix`: of its shared-memory regions."""
        self._address = address
        self._metrics_address = metrics_address
        self._prefix = prefix
        with_parent_death_signal = [
            sys.executable,
            "-I",
            parent_death_signal.__file__,
            str(os.getpid()),
            *command,
        ]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                with_parent_death_signal,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._handle = psutil.Process(self._process.pid)

    @property
    def pid(self) -> int:
        """Process id of `tritonserver`, which is its process group's too."""
        return self._process.pid

    def exit_reason(self) -> str | None:
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
        except REQUEST_ERRORS:
            return False

    def model_state(self, model: str) -> str:
        """READY, LOADING, UNLOADING, UNAVAILABLE or NO_ANSWER; of a server with keys, which closes its
        index, READY or NOT_READY."""
        try:
            status, body = self._request("POST", "/v2/repository/index")
            if status != 200:
                return "READY" if self._request("GET", f"/v2/models/{model}/ready")[0] == 200 else NOT_READY
        except REQUEST_ERRORS:
            return NO_ANSWER
        models = json.loads(body)
        return next(
            (entry.get("state", "UNAVAILABLE") for entry in models if entry["name"] == model), NO_ANSWER
        )

    def unload(self, model: str) -> bool | None:
        """Unloads a model once the requests in it have ended; new ones are refused at once.

        False: the server refuses that. None: it did not answer.
        """
        try:
            return self._request("POST", f"/v2/repository/models/{model}/unload")[0] == 200
        except REQUEST_ERRORS:
            return None

    def requests_in_flight(self) -> float | None:
        """FastServe's gauges of requests that wait or run, together; None: the server did not answer."""
        try:
            page = self._request("GET", "/metrics", self._metrics_address)[1].decode()
        except ConnectionRefusedError:
            return 0.0  # a server without a metrics port does not say
        except REQUEST_ERRORS:
            return None
        return requests_in_flight(page)

    def resource_usage(self) -> tuple[float, int]:
        """Seconds of CPU and bytes read so far, of all processes of the group that live."""
        seconds, read = 0.0, 0
        for member in self._members():
            with contextlib.suppress(psutil.Error):
                times = member.cpu_times()
                seconds += times.user + times.system
                read += member.io_counters().read_chars
        return seconds, read

    def terminate(self) -> None:
        """Asks the server to leave."""
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
        remove_regions(self._prefix)

    def _members(self) -> list[psutil.Process]:
        members = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) == self.pid:
                    members.append(process)
        return members

    def _request(self, method: str, path: str, address: tuple[str, int] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*(address or self._address), timeout=REQUEST_SECONDS)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def requests_in_flight(page: str) -> float:
    """The sum of FastServe's gauges of requests in a page of metrics; 0 where there is none."""
    samples = (line.rpartition(" ") for line in page.splitlines() if line.startswith(IN_FLIGHT))
    return sum(float(value) for _, _, value in samples)


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
