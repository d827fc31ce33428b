"""Fetching a wheel once: with pip, from a directory in place of the index."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastserve import assets as downloads
from fastserve.assets import Wheel, wheel_directory
from fastserve.start_error import StartError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path / "cache" / "fastserve"


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    archive = tmp_path / "fastserve_probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as files:
        program = zipfile.ZipInfo("probe/bin/run")
        program.external_attr = 0o755 << 16
        files.writestr(program, "#!/bin/sh\n")
        files.writestr("probe/data", "data")
        files.writestr("unwanted/data", "data")
        info = "fastserve_probe-1.0.dist-info"
        files.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fastserve-probe\nVersion: 1.0\n")
        files.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr(f"{info}/RECORD", "")
    return Wheel("fastserve-probe", "1.0", hashlib.sha256(archive.read_bytes()).hexdigest(), ("probe/",))


def test_only_the_wanted_files_are_unpacked_with_their_permissions(cache: Path, wheel: Wheel) -> None:
    directory = wheel_directory(wheel)
    assert directory == cache / "fastserve-probe-1.0"
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert files == {"probe/bin/run", "probe/data"}
    assert (directory / "probe/bin/run").stat().st_mode & 0o111 == 0o111
    assert (directory / "probe/data").stat().st_mode & 0o111 == 0


def test_it_is_fetched_once_also_by_two_at_the_same_time(
    cache: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetches: list[Wheel] = []
    fetch = downloads._fetch

    def counted(wheel: Wheel, directory: Path) -> None:
        fetches.append(wheel)
        fetch(wheel, directory)

    monkeypatch.setattr(downloads, "_fetch", counted)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(wheel_directory, [wheel, wheel])
    assert first == second == wheel_directory(wheel)
    assert len(fetches) == 1


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(cache: Path, wheel: Wheel) -> None:
    altered = Wheel(wheel.project, wheel.version, "0" * 64, wheel.members)
    with pytest.raises(StartError, match=r"pip could not fetch fastserve-probe==1\.0"):
        wheel_directory(altered)
    assert [path.name for path in cache.iterdir()] == ["fastserve-probe-1.0.lock"]


def test_a_wheel_that_is_nowhere_names_the_remedy(cache: Path) -> None:
    with pytest.raises(StartError, match=r"check the network .* PIP_FIND_LINKS"):
        wheel_directory(Wheel("fastserve-nowhere", "1.0", "0" * 64, ()))


def test_a_cache_that_cannot_be_written_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: Wheel
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(StartError, match="set XDG_CACHE_HOME"):
        wheel_directory(wheel)


def test_a_python_without_pip_names_the_remedy(
    cache: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartError, match="-m ensurepip"):
        wheel_directory(wheel)
