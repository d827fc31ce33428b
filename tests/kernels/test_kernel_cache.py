"""Compiled kernels have a place, also where neither the sources nor a home can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from fastserve_kernels.cpu.kernels import kernel_cache
from fastserve_kernels.cpu.kernels.kernel_cache import CACHE_VARIABLE, choose_cache_directory


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file where directories should be: nobody can write there, root neither."""
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.delenv(CACHE_VARIABLE)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return file


def test_sources_that_can_be_written_are_left_to_numba(tmp_path: Path) -> None:
    choose_cache_directory(tmp_path)
    assert CACHE_VARIABLE not in os.environ


def test_a_cache_of_the_users_is_left_to_numba(
    tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    choose_cache_directory(nowhere)
    assert CACHE_VARIABLE not in os.environ


def test_without_either_a_temporary_directory_is_used(tmp_path: Path, nowhere: Path) -> None:
    choose_cache_directory(nowhere)
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "tmp" / f"fastserve-kernels-{os.getuid()}")


def test_a_home_that_is_unknown_is_none(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(kernel_cache.os.path, "expanduser", lambda path: path)
    choose_cache_directory(nowhere)
    assert CACHE_VARIABLE in os.environ
    assert not Path("~").exists()


def test_a_directory_that_another_has_prepared_is_not_used(tmp_path: Path, nowhere: Path) -> None:
    (tmp_path / "theirs").mkdir()
    prepared = tmp_path / "tmp" / f"fastserve-kernels-{os.getuid()}"
    prepared.symlink_to(tmp_path / "theirs")
    choose_cache_directory(nowhere)
    assert Path(os.environ[CACHE_VARIABLE]) not in (prepared, tmp_path / "theirs")
