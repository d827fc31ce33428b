"""What of the server's log comes to the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.launcher.server_log import LOGS_KEPT, ServerLog, is_notable, new_log


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('I1120 04:05:58.532543 5171 model_lifecycle.cc:472] "loading: a:1"', False),
        ('E1120 04:05:58.532612 5171 model_lifecycle.cc:642] "failed to load"', True),
        ('W1120 04:05:58.532612 5171 grpc_server.cc:1] "something"', True),
        ('E1120 04:05:58.532612 5171 server.cc:241] "CudaDriverHelper has not been initialized."', False),
        ("| a         | 1       | READY  |", False),
        ("", False),
        ("Traceback (most recent call last):", True),
    ],
)
def test_warnings_errors_and_what_models_print_are_shown(line: str, shown: bool) -> None:
    assert is_notable(line) is shown


def test_a_line_is_given_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one\ntw")
    log = ServerLog(path)
    assert log.new_lines() == ["one"]
    assert log.new_lines() == []
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert log.new_lines() == ["two", "three"]
    assert log.last_lines(2) == ["two", "three"]


def test_a_log_that_has_grown_long_goes_on_beside_what_it_held(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = ServerLog(path, max_bytes=100)
    with path.open("ab") as server:
        server.write(b"x" * 99 + b"\nhalf a li")
        server.flush()
        assert log.new_lines() == ["x" * 99]
        server.write(b"ne\n")
        server.flush()
        assert log.new_lines() == ["half a line"]
        assert log.size() == 0
        server.write(b"the next\n")
        server.flush()
    assert log.new_lines() == ["the next"]
    assert (tmp_path / "log.1").read_bytes() == b"x" * 99 + b"\nhalf a line\n"


def test_the_latest_logs_are_kept_and_those_in_use(tmp_path: Path) -> None:
    in_use = ServerLog(tmp_path / "server-20200101-000000-first.log")
    for number in range(2 * LOGS_KEPT):
        (tmp_path / f"server-20210101-0000{number:02}-run.log").touch()
    (tmp_path / "server-20210101-000000-run.log.1").touch()
    log = new_log(tmp_path, "fastserve_run")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == LOGS_KEPT + 1
    assert left[0] == in_use.path.name
    assert left[1:-1] == [
        f"server-20210101-0000{number:02}-run.log" for number in range(LOGS_KEPT + 1, 2 * LOGS_KEPT)
    ]
    assert left[-1] == log.path.name
