"""A drain ends when nothing is in flight, not before, and refuses what is new."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.config import STOPPING_VARIABLE, is_stopping
from fastserve.launcher.drain import Drain

ALL = ["engine", "fastserve", "fastserve_infer", "preprocess"]


class FakeServer:
    """A server whose gauges, states and answers are what the test says."""

    def __init__(self) -> None:
        self.in_flight: float | None = 0
        self.answers: bool | None = True
        self.states: dict[str, str] = {}
        self.unloaded: list[str] = []
        self.seconds = 0.0

    def requests_in_flight(self) -> float | None:
        return self.in_flight

    def unload(self, model: str) -> bool | None:
        self.unloaded.append(model)
        return self.answers

    def resource_usage(self) -> tuple[float, int]:
        return self.seconds, 0

    def model_state(self, model: str) -> str:
        return self.states.get(model, "UNAVAILABLE")


def test_new_requests_are_refused_from_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STOPPING_VARIABLE, str(tmp_path / "stopping"))
    assert not is_stopping()
    Drain(FakeServer(), ALL, tmp_path / "stopping")
    assert is_stopping()


def test_without_a_launcher_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STOPPING_VARIABLE, raising=False)
    assert not is_stopping()


@pytest.mark.parametrize("in_flight", [1.0, None])
def test_nothing_is_unloaded_while_the_gauges_say_that_requests_run_or_say_nothing(
    tmp_path: Path, in_flight: float | None
) -> None:
    server = FakeServer()
    server.in_flight = in_flight
    drain = Drain(server, ALL, tmp_path / "stopping")
    assert not drain.is_done()
    assert server.unloaded == []
    server.in_flight = 0
    assert drain.is_done()
    assert server.unloaded == ["fastserve_infer", "fastserve"]


@pytest.mark.parametrize("state", ["UNLOADING", "READY", ""])
def test_a_model_that_is_not_unloaded_has_requests_in_flight(tmp_path: Path, state: str) -> None:
    server = FakeServer()
    server.states["fastserve"] = state
    drain = Drain(server, ALL, tmp_path / "stopping")
    assert not drain.is_done()
    server.states["fastserve"] = "UNAVAILABLE"
    assert drain.is_done()


def test_a_server_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    server = FakeServer()
    server.answers = None
    drain = Drain(server, ALL, tmp_path / "stopping")
    assert not drain.is_done()
    server.answers = True
    assert drain.is_done()


def test_a_server_that_lets_nobody_unload_is_drained_when_it_has_computed_nothing_for_a_while(
    tmp_path: Path,
) -> None:
    server, times = FakeServer(), iter([0.0, 1.0, 2.0, 4.0, 6.0])
    server.answers = False
    server.states = dict.fromkeys(ALL, "READY")
    drain = Drain(server, ALL, tmp_path / "stopping", clock=lambda: next(times))
    assert not drain.is_done()
    assert not drain.is_done()
    server.seconds = 1.0
    assert not drain.is_done()
    assert drain.is_done()


def test_all_models_of_another_repository_are_unloaded(tmp_path: Path) -> None:
    server = FakeServer()
    assert Drain(server, ["echo", "other"], tmp_path / "stopping").is_done()
    assert server.unloaded == ["echo", "other"]


class Hour:
    """Looks at a drain ten times a second."""

    def __init__(self, server: FakeServer, path: Path, cpu: float) -> None:
        """`cpu`: seconds that the server computes in a second."""
        self.now = 0.0
        self._server = server
        self._cpu = cpu
        self._drain = Drain(server, ALL, path, clock=lambda: self.now)

    def is_done_within(self, seconds: float) -> bool:
        for _ in range(int(10 * seconds)):
            self.now += 0.1
            self._server.seconds = self._cpu * self.now
            if self._drain.is_done():
                return True
        return False


def test_a_request_that_is_counted_for_ever_does_not_hold_up_a_server_that_computes_nothing(
    tmp_path: Path,
) -> None:
    server = FakeServer()
    server.states["fastserve"] = "UNLOADING"
    assert Hour(server, tmp_path / "stopping", cpu=0.02).is_done_within(2.0)


def test_a_server_that_computes_may_read_a_prompt_that_no_gauge_shows_yet(tmp_path: Path) -> None:
    server = FakeServer()
    server.states["fastserve"] = "UNLOADING"
    hour = Hour(server, tmp_path / "stopping", cpu=0.2)
    assert not hour.is_done_within(60)
    server.states.clear()
    assert hour.is_done_within(1)


def test_gauges_that_rise_again_are_believed(tmp_path: Path) -> None:
    server = FakeServer()
    server.states["fastserve"] = "UNLOADING"
    hour = Hour(server, tmp_path / "stopping", cpu=0.0)
    assert not hour.is_done_within(1)
    server.in_flight = 1
    assert not hour.is_done_within(60)


def test_models_without_gauges_may_wait_without_computing(tmp_path: Path) -> None:
    server = FakeServer()
    server.states["echo"] = "UNLOADING"
    now = [0.0]
    drain = Drain(server, ["echo"], tmp_path / "stopping", clock=lambda: now[0])
    for _ in range(100):
        now[0] += 1.0
        assert not drain.is_done()


def test_encoders_are_unloaded_after_what_the_gauges_speak_of(tmp_path: Path) -> None:
    server = FakeServer()
    assert Drain(server, [*ALL, "embed", "mine"], tmp_path / "stopping").is_done()
    assert server.unloaded == ["fastserve_infer", "fastserve", "embed", "mine"]
    alone = FakeServer()
    assert Drain(alone, ["embed"], tmp_path / "stopping").is_done()
    assert alone.unloaded == ["embed"]
