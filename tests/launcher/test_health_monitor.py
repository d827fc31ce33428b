"""A dead process is noticed; an unloaded model is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import cast

import psutil
import pytest

from fastserve.launcher import health_monitor as module
from fastserve.launcher.health_monitor import HealthMonitor
from fastserve.launcher.server_process import NO_ANSWER, ServerProcess, is_alive
from fastserve.launcher.stall_detector import StallDetector


class FakeServer:
    """A server whose one stub is a real process."""

    def __init__(self, stub: psutil.Process) -> None:
        self.stub = stub
        self.state = "READY"
        self.successor: psutil.Process | None = None
        self.ended: str | None = None
        self.computes = False
        self.seconds = 0.0

    def exit_reason(self) -> str | None:
        return self.ended

    def stubs(self) -> dict[psutil.Process, str]:
        return {each: "engine" for each in (self.stub, self.successor) if each and is_alive(each)}

    def resource_usage(self) -> tuple[float, int]:
        self.seconds += self.computes
        return self.seconds, 0

    def model_state(self, model: str) -> str:
        assert model == "engine"
        return self.state


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def watched(child: subprocess.Popen[bytes]) -> tuple[FakeServer, HealthMonitor]:
    server = FakeServer(psutil.Process(child.pid))
    monitor = HealthMonitor(cast(ServerProcess, server))
    assert monitor.failure() is None
    return server, monitor


def test_a_stub_that_died_is_noticed_once(child: subprocess.Popen[bytes]) -> None:
    _, monitor = watched(child)
    child.kill()
    child.wait()
    assert monitor.failure() == "the process of model `engine` ended"
    assert monitor.failure() is None


@pytest.mark.parametrize("computes", [True, False])
def test_a_server_that_gives_no_answer_is_slow_while_it_computes(
    child: subprocess.Popen[bytes], computes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10_000))
    monkeypatch.setattr(module, "StallDetector", partial(StallDetector, clock=lambda: float(next(now))))
    server, monitor = watched(child)
    server.computes, server.state = computes, NO_ANSWER
    child.kill()
    child.wait()
    failures = [monitor.failure() for _ in range(100)]
    assert any(failures) is not computes
    server.state = "READY"
    assert monitor.failure() == ("the process of model `engine` ended" if computes else None)


@pytest.mark.parametrize("state", ["UNLOADING", "UNAVAILABLE", "NOT READY"])
def test_a_model_that_was_unloaded_is_no_failure(child: subprocess.Popen[bytes], state: str) -> None:
    server, monitor = watched(child)
    server.state = state
    child.kill()
    child.wait()
    assert monitor.failure() is None


@pytest.mark.parametrize("has_successor", [True, False], ids=["new stub", "none"])
def test_a_model_that_is_loaded_anew_needs_a_new_stub(
    child: subprocess.Popen[bytes], has_successor: bool
) -> None:
    server, monitor = watched(child)
    child.kill()
    child.wait()
    server.state = "LOADING"
    assert monitor.failure() is None
    server.state, server.successor = "READY", psutil.Process() if has_successor else None
    assert (monitor.failure() is None) is has_successor


def test_a_server_that_ended_is_noticed(child: subprocess.Popen[bytes]) -> None:
    server, monitor = watched(child)
    server.ended = "tritonserver was ended by SIGSEGV"
    assert monitor.failure() == server.ended


def test_a_zombie_is_not_alive(child: subprocess.Popen[bytes]) -> None:
    process = psutil.Process(child.pid)
    assert is_alive(process)
    child.kill()
    psutil.wait_procs([process], timeout=0)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        pass
    assert not is_alive(process)
