"""The secret that the models of one server share, and nobody else."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastserve.ensemble import shared_secret


def test_all_who_have_one_parent_share_a_secret_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_secret, "DIRECTORY", tmp_path)
    with ThreadPoolExecutor(8) as threads:
        secrets = set(threads.map(shared_secret.shared_secret, [os.getpid()] * 32))
    assert len(secrets) == 1
    assert len(secrets.pop()) == shared_secret.SECRET_BYTES
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert shared_secret.shared_secret(os.getppid()) != shared_secret.shared_secret(os.getpid())


def test_files_of_servers_that_are_gone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_secret, "DIRECTORY", tmp_path)
    living = shared_secret.shared_secret(os.getppid())
    name = next(tmp_path.iterdir()).name
    (tmp_path / f"{name}0").write_bytes(b"of a process with that id which started at another time")
    (tmp_path / "fastserve_secret_1_1_1").write_bytes(b"of another container")
    shared_secret.shared_secret(os.getpid())
    assert not (tmp_path / f"{name}0").exists()
    assert (tmp_path / "fastserve_secret_1_1_1").exists()
    assert shared_secret.shared_secret(os.getppid()) == living


def test_a_file_that_others_could_read_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_secret, "DIRECTORY", tmp_path)
    shared_secret.shared_secret(os.getpid())
    next(tmp_path.iterdir()).chmod(0o644)
    with pytest.raises(PermissionError, match="its owner or its mode"):
        shared_secret.shared_secret(os.getpid())
