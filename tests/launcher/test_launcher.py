"""The launcher with a real Triton server and two small models."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from fastserve.assets import server_files
from fastserve.config import Config
from fastserve.launcher.command_line import ServerOptions
from fastserve.launcher.installation import PYTHON
from fastserve.launcher.launcher import Server
from fastserve.launcher.run_directory import RunDirectory
from fastserve.launcher.server_process import is_alive
from fastserve.launcher.start_checks import SHARED_MEMORY, free_ports
from fastserve.start_error import StartError
from fastserve_client import Client

READY_SECONDS = 60
RESTART_SECONDS = 40
HANG_SECONDS = 10
IDLE_STOP_SECONDS = 15
"""A stop that is held up takes the exit timeout; one that is not, 2 s on a quiet machine."""
CONFIG = """
backend: "python"
max_batch_size: 0
input [{ name: "text" data_type: TYPE_STRING dims: [1] }]
output [{ name: "said" data_type: TYPE_STRING dims: [1] }]
instance_group [{ count: 1 kind: KIND_CPU }]
"""
ECHO = """
import os, sys, time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        if os.path.exists({stall!r}):
            os.rename({stall!r}, {stall!r} + "ed")
            time.sleep(60)
        texts = [pb_utils.get_input_tensor_by_name(each, "text").as_numpy() for each in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("said", text)]) for text in texts]
"""
BROKEN = """
raise RuntimeError("no such checkpoint")
"""


def write_model(repository: Path, name: str, code: str) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(CONFIG)
    (repository / name / "1" / "model.py").write_text(code)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repository")
    for name in ("echo", "other"):
        write_model(path, name, ECHO.format(stall=str(path / f"stall-{name}")))
    return path


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    options = ServerOptions(ports=free_ports(), model_repository=repository, exit_timeout_seconds=5)
    with Server(Config(), options) as running:
        running.wait_ready(READY_SECONDS)
        yield running


def post(url: str, body: object, timeout: float = 5) -> str:
    request = urllib.request.Request(url, data=json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read().decode()


def said(server: Server, model: str = "echo", timeout: float = 5) -> str:
    return json.loads(post(f"{server.http_url}/v2/models/{model}/generate", {"text": "hello"}, timeout))[
        "said"
    ]


def pid_of(server: Server, model: str) -> int:
    return next(stub.pid for stub, name in server.process.stubs().items() if name == model)


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition, which nothing announces, came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_it_serves(server: Server) -> None:
    assert said(server) == "hello"
    assert sorted(server.process.stubs().values()) == ["echo", "other"]
    with urllib.request.urlopen(server.metrics_url, timeout=5) as page:
        assert b"nv_inference_count" in page.read()


def test_the_ports_are_open_on_the_loopback_address_only(server: Server) -> None:
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for connection in psutil.net_connections("tcp")
        if connection.pid == server.process.pid and connection.status == psutil.CONN_LISTEN
    }
    ports = server.options.ports
    assert listening == {("127.0.0.1", port) for port in (ports.http, ports.grpc, ports.metrics)}


@pytest.mark.parametrize("killed", ["echo", "other", "tritonserver"])
def test_the_server_is_started_anew_when_a_process_dies(server: Server, killed: str) -> None:
    count = len(server.restarts)
    pid = server.process.pid if killed == "tritonserver" else pid_of(server, killed)
    os.kill(pid, signal.SIGKILL)
    server.wait_restarts(count + 1, RESTART_SECONDS)
    assert killed in server.restarts[-1].reason
    assert said(server) == "hello"


def test_no_client_hangs_when_a_stub_dies(server: Server, repository: Path) -> None:
    count = len(server.restarts)
    stall = repository / "stall-echo"
    stall.touch()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(said, server, timeout=50)
        assert until((repository / "stall-echoed").exists, 5)
        os.kill(pid_of(server, "echo"), signal.SIGKILL)
        assert isinstance(answer.exception(timeout=HANG_SECONDS), OSError)
    server.wait_restarts(count + 1, RESTART_SECONDS)


def test_unloading_a_model_is_no_crash(server: Server) -> None:
    restarts, stub = len(server.restarts), psutil.Process(pid_of(server, "other"))
    control = f"{server.http_url}/v2/repository/models/other"
    post(f"{control}/unload", {})
    assert until(lambda: not is_alive(stub), 10)
    post(f"{control}/load", {}, timeout=20)
    assert said(server, "other") == "hello"
    assert len(server.restarts) == restarts


def test_a_model_that_cannot_load_ends_the_start_with_the_reason(tmp_path: Path) -> None:
    write_model(tmp_path, "broken", BROKEN)
    with (
        Server(Config(), ServerOptions(ports=free_ports(), model_repository=tmp_path)) as server,
        pytest.raises(StartError, match="no such checkpoint"),
    ):
        server.wait_ready(READY_SECONDS)


def test_stopping_leaves_nothing(repository: Path) -> None:
    options = ServerOptions(ports=free_ports(), model_repository=repository)
    with Server(Config(), options) as server:
        server.wait_ready(READY_SECONDS)
        processes = [psutil.Process(server.process.pid), *server.process.stubs()]
        assert regions_of(processes)
    assert not any(is_alive(process) for process in processes)
    assert not server.run_directory.path.exists()
    assert not regions_with(server)
    assert "loading: echo" in server.log_path.read_text()


def regions_of(processes: list[psutil.Process]) -> set[str]:
    return {map.path for process in processes for map in process.memory_maps() if "/dev/shm" in map.path}


def regions_with(server: Server) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"{server.run_directory.region_prefix}*"))


LAUNCHER = """
import sys
from pathlib import Path
from fastserve.config import Config
from fastserve.launcher.command_line import ServerOptions
from fastserve.launcher.launcher import Server
from fastserve.launcher.start_checks import free_ports
server = Server(Config(), ServerOptions(ports=free_ports(), model_repository=Path(sys.argv[1])))
server.start()
server.wait_ready(60)
print(server.process.pid, *[stub.pid for stub in server.process.stubs()], flush=True)
server.join()
"""


def test_the_server_goes_when_the_launcher_is_killed(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        processes = [psutil.Process(int(pid)) for pid in launcher.stdout.readline().split()]
        regions = regions_of(processes)
        launcher.kill()
    assert len(processes) == 3
    assert until(lambda: not any(is_alive(process) for process in processes), 20)
    assert until(lambda: not any(Path(region).exists() for region in regions), 5)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_it_serves_on_ipv6_with_flags_of_the_operators(repository: Path) -> None:
    flags = ("--metrics-config=summary_latencies=true",)
    options = ServerOptions(
        host="::1", ports=free_ports("::1"), model_repository=repository, server_flags=flags
    )
    with Server(Config(), options) as server:
        server.wait_ready(READY_SECONDS)
        assert server.http_url == f"http://[::1]:{options.ports.http}"
        assert said(server) == "hello"
        with urllib.request.urlopen(server.metrics_url, timeout=5) as page:
            assert b"nv_inference_request_summary_us" in page.read()
        with Client(server.grpc_address, retries=0) as client:
            assert client.is_ready()


def test_open_connections_do_not_hold_up_a_stop(repository: Path) -> None:
    options = ServerOptions(ports=free_ports(), model_repository=repository, exit_timeout_seconds=60)
    with (
        Server(Config(), options) as server,
        Client(server.grpc_address, retries=0) as client,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", options.ports.http)) as connection,
    ):
        server.wait_ready(READY_SECONDS)
        assert client.is_ready()
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().read() == b""
        start = time.monotonic()
        server.stop()
        assert time.monotonic() - start < IDLE_STOP_SECONDS


def test_nothing_is_written_to_the_repository_once_the_server_has_seen_it(tmp_path: Path) -> None:
    write_model(tmp_path, "echo", ECHO.format(stall=str(tmp_path / "stall")))

    def entries() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}

    with Server(Config(), ServerOptions(ports=free_ports(), model_repository=tmp_path)) as server:
        before = entries()
        server.wait_ready(READY_SECONDS)
        assert said(server) == "hello"
        assert entries() == before


ODD = 'ödd dir\'s "q", a=b; $x & (c) 目'
READER = """
import os
import numpy as np
import triton_python_backend_utils as pb_utils
from fastserve.config import read_config

class TritonPythonModel:
    def execute(self, requests):
        with open(read_config().model) as model, open(os.path.expanduser("~/file")) as file:
            said = np.array([model.read() + file.read()], dtype=object)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("said", said)]) for _ in requests]
"""
ODD_LAUNCHER = """
import json, sys, urllib.request
from pathlib import Path
from fastserve.config import Config
from fastserve.launcher.command_line import ServerOptions
from fastserve.launcher.launcher import Server
from fastserve.launcher.start_checks import free_ports
odd = Path(sys.argv[1])
options = ServerOptions(ports=free_ports(), model_repository=odd / "models")
with Server(Config(model=str(odd / "model.gguf")), options) as server:
    server.wait_ready(90)
    request = urllib.request.Request(f"{server.http_url}/v2/models/reader/generate", data=b'{"text": ""}')
    print(sys.prefix, json.load(urllib.request.urlopen(request))["said"])
"""


def test_it_starts_from_any_path(tmp_path: Path) -> None:
    odd = tmp_path / ODD
    write_model(odd / "models", "reader", READER)
    (odd / "model.gguf").write_text("weights and ")
    (odd / "file").write_text("a file at home")
    environment, packages = odd / "environment", Path("lib", f"python{PYTHON}", "site-packages")
    (environment / packages).mkdir(parents=True)
    (environment / "bin").mkdir()
    (environment / "bin" / "python3").symlink_to(Path(sys.executable).resolve())
    (environment / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    modules = []
    for number, entry in enumerate(path for path in sys.path if Path(path).is_dir()):
        modules.append(odd / f"modules-{number}")
        modules[-1].symlink_to(entry)
    (environment / packages / "odd.pth").write_text("\n".join(map(str, modules)))
    (odd / "fastserve").mkdir()
    server = server_files()
    (odd / "fastserve" / server.name).symlink_to(server)
    python = environment / "bin" / "python3"
    variables = os.environ | {"XDG_CACHE_HOME": str(odd), "HOME": str(odd), "LC_ALL": "C.UTF-8"}
    finished = subprocess.run(
        [python, "-c", ODD_LAUNCHER, odd], env=variables, capture_output=True, text=True, timeout=200
    )
    assert finished.stdout == f"{environment} weights and a file at home\n", finished.stderr


def test_what_a_killed_launcher_left_is_removed_by_the_next_start(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pids = launcher.stdout.readline().split()
        (directory,) = (
            Path(word).parent.parent.parent.parent
            for word in psutil.Process(int(pids[0])).cmdline()
            if word.endswith("/server/bin/tritonserver")
        )
        launcher.kill()
    assert directory.exists()
    RunDirectory().remove()
    assert list(SHARED_MEMORY.glob(f"{directory.name}*")) == []
