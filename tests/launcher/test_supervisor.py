"""When a server is started again, and when it is given up; with processes that only play their part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import psutil
import pytest

from fastserve.triton_server import supervisor as module
from fastserve.triton_server.server_log import ServerLog
from fastserve.triton_server.server_process import ServerProcess
from fastserve.triton_server.start_error import StartError
from fastserve.triton_server.supervisor import STARTS_TRIED, Restart, Supervisor, pause_after


class Actor:
    """A server that is ready at once, or never, and then dies when it is asked so often how it is."""

    def __init__(
        self, gets_ready: bool, dies_after: int | None, at_ready: Callable[[], None] | None = None
    ) -> None:
        self.gets_ready = gets_ready
        self.questions_left = dies_after
        self.at_ready = at_ready
        self.terminated = self.killed = False

    def end(self) -> str | None:
        if self.terminated:
            return "tritonserver ended with status 0"
        if self.questions_left is None:
            return None
        self.questions_left -= 1
        return "tritonserver was ended by SIGSEGV" if self.questions_left < 0 else None

    def is_ready(self) -> bool:
        if self.gets_ready and self.at_ready:
            self.at_ready()
        return self.gets_ready

    def stubs(self) -> dict[psutil.Process, str]:
        return {}

    def terminate(self) -> None:
        self.terminated = True

    def kill(self) -> None:
        self.killed = True


class Play:
    """The supervisor with a cast of actors, and what its listener was told."""

    def __init__(self, path: Path, *actors: Actor) -> None:
        path.write_text("E1120 04:05:58 the reason\n")
        self.actors = list(actors)
        self.played: list[Actor] = []
        self.ready_seconds: list[float] = []
        self.restarts: list[Restart] = []
        self.shown: list[str] = []
        self.supervisor = Supervisor(self.start, ServerLog(path), self, exit_timeout_seconds=5)

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
    monkeypatch.setattr(module, "pause_after", lambda failures: 0.0)


def test_it_stops_the_server_when_it_is_asked(tmp_path: Path) -> None:
    actor = Actor(gets_ready=True, dies_after=None)
    play = Play(tmp_path / "log", actor)
    actor.at_ready = play.supervisor.ask_stop
    play.supervisor.run()
    assert actor.terminated
    assert actor.killed


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
    ask = play.supervisor.ask_stop
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
    failing = [Actor(gets_ready=False, dies_after=2) for _ in range(STARTS_TRIED)]
    play = Play(tmp_path / "log", Actor(gets_ready=True, dies_after=4), *failing)
    with pytest.raises(StartError, match="cannot run"):
        play.supervisor.run()
    assert len(play.played) == 1 + STARTS_TRIED
    assert all(actor.killed for actor in play.played)


def test_pauses_grow_and_are_bounded() -> None:
    pauses = [pause_after(failures) for failures in range(10)]
    assert pauses[:5] == [0.0, 0.0, 1.0, 2.0, 4.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == module.LONGEST_PAUSE_SECONDS
