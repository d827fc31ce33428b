"""What a run leaves on the machine goes with it, or with the next start when it was killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastserve.launcher import run_directory as module
from fastserve.launcher.run_directory import RunDirectory
from fastserve.start_error import StartError

OTHER_LAUNCHER = """
import sys
from pathlib import Path
from fastserve.launcher import run_directory
run_directory.SHARED_MEMORY = Path(sys.argv[1])
run = run_directory.RunDirectory()
(Path(sys.argv[1]) / f"{run.region_prefix}region").touch()
print(run.path, flush=True)
input()
"""


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path)
    return tmp_path


@pytest.fixture
def other(memory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another launcher that lives."""
    command = [sys.executable, "-c", OTHER_LAUNCHER, str(memory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_it_goes_with_its_regions(memory: Path) -> None:
    run = RunDirectory()
    (memory / f"{run.region_prefix}region").touch()
    assert run.link("a/b", memory).resolve() == memory
    run.remove()
    assert list(memory.iterdir()) == []


def test_what_a_killed_launcher_left_goes_at_the_next_start(
    memory: Path, other: subprocess.Popen[str]
) -> None:
    path = Path(line_of(other))
    other.kill()
    other.wait()
    assert path.exists()
    run = RunDirectory()
    assert list(memory.iterdir()) == [run.path]


def test_what_belongs_to_a_launcher_that_lives_stays(memory: Path, other: subprocess.Popen[str]) -> None:
    path = Path(line_of(other))
    RunDirectory().remove()
    assert sorted(memory.iterdir()) == [path, memory / f"{path.name}_region"]


def test_what_is_not_a_run_stays(memory: Path) -> None:
    (memory / "fastserve_file").touch()
    (memory / "fastserve_link").symlink_to(memory)
    (memory / "another").mkdir()
    RunDirectory().remove()
    assert sorted(path.name for path in memory.iterdir()) == ["another", "fastserve_file", "fastserve_link"]


def test_memory_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path / "nowhere")
    with pytest.raises(StartError, match=r"cannot write to .*nowhere: No such file"):
        RunDirectory()
