"""What of the server's log comes to the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.triton_server.server_log import ServerLog, worth_showing


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
    assert worth_showing(line) is shown


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
