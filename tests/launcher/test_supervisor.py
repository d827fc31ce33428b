"""When a server is started again, and when it is given up; with processes that only play their part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import psutil
import pytest

from fastserve.launcher import supervisor as module
from fastserve.launcher.drain import Drain
from fastserve.launcher.server_log import ServerLog
from fastserve.launcher.server_process import ServerProcess
from fastserve.launcher.stall_detector import StallDetector
from fastserve.launcher.supervisor import MAX_FAILED_STARTS, Restart, Supervisor, restart_backoff
from fastserve.start_error import StartError


class Actor:
    """A server that is ready at once, or never, and then dies when it is asked so often how it is."""

    def __init__(
        self, gets_ready: bool, dies_after: int | None, at_ready: Callable[[], None] | None = None
    ) -> None:
        self.gets_ready = gets_ready
        self.questions_left = dies_after
        self.at_ready = at_ready
        self.at_question: Callable[[], None] | None = None
        self.terminated = self.killed = False
        self.in_flight = 0
        self.unloaded: list[str] = []

    def exit_reason(self) -> str | None:
        if self.terminated:
            return "tritonserver ended with status 0"
        if self.questions_left is None:
            return None
        self.questions_left -= 1
        return "tritonserver was ended by SIGSEGV" if self.questions_left < 0 else None

    def is_ready(self) -> bool:
        if self.at_question:
            self.at_question()
        if self.gets_ready and self.at_ready:
            self.at_ready()
        return self.gets_ready

    def stubs(self) -> dict[psutil.Process, str]:
        return {}

    def resource_usage(self) -> tuple[float, int]:
        return 0.0, 0

    def requests_in_flight(self) -> float:
        self.in_flight = max(0, self.in_flight - 1)
        return self.in_flight

    def unload(self, model: str) -> bool:
        self.unloaded.append(model)
        return True

    def model_state(self, model: str) -> str:
        return "UNAVAILABLE" if model in self.unloaded else "READY"

    def terminate(self) -> None:
        self.terminated = True

    def kill(self) -> None:
        self.killed = True


class FakeClock:
    """Time that passes whenever it is asked for."""

    def __init__(self, seconds_per_look: float) -> None:
        self.now = 0.0
        self._seconds_per_look = seconds_per_look

    def __call__(self) -> float:
        self.now += self._seconds_per_look
        return self.now


class Play:
    """The supervisor with a cast of actors, and what its listener was told."""

    def __init__(self, path: Path, *actors: Actor) -> None:
        path.write_text("E1120 04:05:58 the reason\n")
        self.actors = list(actors)
        self.played: list[Actor] = []
        self.ready_seconds: list[float] = []
        self.restarts: list[Restart] = []
        self.shown: list[str] = []
        self.stopping_file = path.with_name("stopping")
        self.supervisor = Supervisor(
            self.start,
            drain=lambda process: Drain(process, ["fastserve", "fastserve_infer"], self.stopping_file),
            exit_timeout_seconds=5,
            log=ServerLog(path),
            listener=self,
        )

    def start(self) -> ServerProcess:
        self.played.append(self.actors.pop(0))
        return cast(ServerProcess, self.played[-1])

    def ready(self, seconds: float) -> None:
        self.ready_seconds.append(seconds)

    def restarted(self, restart: Restart) -> None:
        self.restarts.append(restart)

    def show(self, line: str) -> None:
        self.shown.append(line)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(module, "restart_backoff", lambda failures: 0.0)


def test_it_stops_the_server_when_it_is_asked(tmp_path: Path) -> None:
    actor = Actor(gets_ready=True, dies_after=None)
    play = Play(tmp_path / "log", actor)
    actor.at_ready = play.supervisor.request_shutdown
    play.supervisor.run()
    assert actor.terminated
    assert actor.killed


def test_a_server_that_has_requests_in_flight_is_told_to_leave_when_they_have_ended(tmp_path: Path) -> None:
    actor = Actor(gets_ready=True, dies_after=None)
    play = Play(tmp_path / "log", actor)
    actor.in_flight = 20
    actor.at_ready = play.supervisor.request_shutdown
    play.supervisor.run()
    assert play.stopping_file.exists()
    assert actor.in_flight == 0
    assert actor.unloaded == ["fastserve_infer", "fastserve"]
    assert actor.terminated
    assert actor.killed
    assert play.restarts == []


def test_a_second_request_to_stop_waits_for_nothing(tmp_path: Path) -> None:
    actor = Actor(gets_ready=True, dies_after=None)
    play = Play(tmp_path / "log", actor)
    actor.in_flight = 1_000_000

    def ask_twice() -> None:
        play.supervisor.request_shutdown()
        play.supervisor.request_shutdown()

    actor.at_ready = ask_twice
    play.supervisor.run()
    assert actor.in_flight > 0
    assert actor.killed
    assert not actor.terminated


def test_what_dies_while_the_server_drains_ends_it(tmp_path: Path) -> None:
    actor = Actor(gets_ready=True, dies_after=10)
    play = Play(tmp_path / "log", actor)
    actor.in_flight = 1_000_000
    actor.at_ready = play.supervisor.request_shutdown
    play.supervisor.run()
    assert any("SIGSEGV; what was in flight is lost" in line for line in play.shown)
    assert len(play.played) == 1


def test_a_server_that_is_not_ready_is_not_drained(tmp_path: Path) -> None:
    actor = Actor(gets_ready=False, dies_after=None)
    play = Play(tmp_path / "log", actor)
    actor.at_question = play.supervisor.request_shutdown
    play.supervisor.run()
    assert actor.killed
    assert not play.stopping_file.exists()


def test_a_start_without_progress_ends_with_the_name_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock(seconds_per_look=1.0)
    monkeypatch.setattr(module, "StallDetector", partial(StallDetector, clock=clock))
    play = Play(tmp_path / "log", Actor(gets_ready=False, dies_after=None))
    with pytest.raises(StartError, match=rf"has done nothing for 60 s.*{tmp_path / 'log'}"):
        play.supervisor.run()
    assert clock.now < 70


def test_a_start_that_computes_may_take_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(seconds_per_look=1.0)
    monkeypatch.setattr(module, "StallDetector", partial(StallDetector, clock=clock))
    actor = Actor(gets_ready=True, dies_after=None)
    play = Play(tmp_path / "log", actor)
    # A fiftieth of a core.
    monkeypatch.setattr(actor, "resource_usage", lambda: (0.02 * clock.now, 0))
    monkeypatch.setattr(actor, "is_ready", lambda: clock.now > 3600)
    play.ready = lambda seconds: play.supervisor.request_shutdown()  # type: ignore[method-assign]
    play.supervisor.run()
    assert clock.now > 3600
    assert actor.terminated


def test_a_server_that_dies_is_started_again(tmp_path: Path) -> None:
    second = Actor(gets_ready=True, dies_after=None)
    play = Play(tmp_path / "log", Actor(gets_ready=True, dies_after=4), second)
    stop_after_ready(play, second)
    play.supervisor.run()
    assert play.played[0].killed
    assert len(play.ready_seconds) == 1
    assert [restart.reason for restart in play.restarts] == ["tritonserver was ended by SIGSEGV"]


def stop_after_ready(play: Play, actor: Actor) -> None:
    """Asks for the stop once the listener knows that this actor was ready."""
    ask = play.supervisor.request_shutdown
    tell = play.restarted

    def told(restart: Restart) -> None:
        tell(restart)
        if play.played[-1] is actor:
            ask()

    play.restarted = told  # type: ignore[method-assign]


def test_a_server_that_never_was_ready_is_not_started_again(tmp_path: Path) -> None:
    play = Play(tmp_path / "log", Actor(gets_ready=False, dies_after=2))
    with pytest.raises(StartError, match=r"SIGSEGV.*\n.*the reason"):
        play.supervisor.run()
    assert len(play.played) == 1


def test_it_gives_up_after_some_starts_that_failed(tmp_path: Path) -> None:
    failing = [Actor(gets_ready=False, dies_after=2) for _ in range(MAX_FAILED_STARTS)]
    play = Play(tmp_path / "log", Actor(gets_ready=True, dies_after=4), *failing)
    with pytest.raises(StartError, match="cannot run"):
        play.supervisor.run()
    assert len(play.played) == 1 + MAX_FAILED_STARTS
    assert all(actor.killed for actor in play.played)


def test_pauses_grow_and_are_bounded() -> None:
    pauses = [restart_backoff(failures) for failures in range(10)]
    assert pauses[:5] == [0.0, 0.0, 1.0, 2.0, 4.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == module.MAX_BACKOFF_SECONDS
