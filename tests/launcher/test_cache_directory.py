"""Where FastServe keeps things, also for a user without a home."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastserve import cache_directory as module
from fastserve.cache_directory import cache_directory, cache_path
from fastserve.start_error import StartError


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    module._warn_once.cache_clear()
    return tmp_path / "tmp" / f"fastserve-{os.getuid()}"


def test_the_users_choice_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / "home" / ".cache" / "fastserve"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_directory() == tmp_path / "cache" / "fastserve"


def test_a_home_that_cannot_be_written_is_said_once(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == cache_directory() == temporary
    assert temporary.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_what_lies_in_a_cache_that_cannot_be_written_is_found(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fastserve" / "there").mkdir(parents=True)
    monkeypatch.setattr(module.os, "access", lambda path, mode: path == temporary)
    assert cache_path("there") == tmp_path / "fastserve" / "there"
    assert cache_path("not-there") == temporary / "not-there"


def test_a_directory_that_another_could_have_prepared_is_not_used(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "theirs").mkdir()
    temporary.symlink_to(tmp_path / "theirs")
    with pytest.raises(StartError, match="set XDG_CACHE_HOME"):
        cache_directory()


NAMELESS = """
import os
os.setgroups([])
os.setgid(54321)
os.setuid(54321)
from fastserve.cache_directory import cache_directory
print(cache_directory())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_without_a_name_or_a_home_has_one(tmp_path: Path) -> None:
    script = f"import fastserve.cache_directory, tempfile; tempfile.tempdir = '/tmp'\n{NAMELESS}"
    variables = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=variables, capture_output=True, text=True, cwd="/"
    )
    assert finished.stdout.strip() == "/tmp/fastserve-54321", finished.stderr
