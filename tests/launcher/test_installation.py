"""Which Triton server is started, and what is said where none can be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastserve.launcher import installation
from fastserve.launcher.installation import (
    PYTHON,
    STUB,
    check_numpy,
    check_platform,
    server_installation,
    shared_libpython,
)
from fastserve.launcher.run_directory import RunDirectory
from fastserve.start_error import StartError


@pytest.fixture
def run() -> Iterator[RunDirectory]:
    directory = RunDirectory()
    yield directory
    directory.remove()


def fake_server(root: Path, python: str) -> Path:
    program = root / "bin" / "tritonserver"
    stub = root / "backends" / "python" / STUB
    for file in (program, stub):
        file.parent.mkdir(parents=True)
        file.write_bytes(f"\x7fELF libpython{python}.so.1.0\x00".encode())
        file.chmod(0o755)
    return program


def test_a_server_on_the_path_is_used_first(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = fake_server(tmp_path, PYTHON)
    monkeypatch.setenv("PATH", str(program.parent))
    found = server_installation(run)
    assert found.executable == program
    assert found.directories == {"backend-directory": tmp_path / "backends"}


def test_a_server_can_be_named(run: RunDirectory, tmp_path: Path) -> None:
    program = fake_server(tmp_path, PYTHON)
    assert server_installation(run, str(program)).executable == program
    with pytest.raises(StartError, match="no program 'nowhere'"):
        server_installation(run, "nowhere")


def test_a_server_for_another_python_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    program = fake_server(tmp_path, "3.99")
    with pytest.raises(StartError, match=r"runs Python 3\.99.*--tritonserver embedded"):
        server_installation(run, str(program))


def test_a_server_without_a_python_backend_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    program = fake_server(tmp_path, PYTHON)
    (tmp_path / "backends" / "python" / STUB).unlink()
    with pytest.raises(StartError, match="has no Python backend"):
        server_installation(run, str(program))


def test_the_stubs_run_in_this_environment(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/elsewhere")
    environment = server_installation(run, str(fake_server(tmp_path, PYTHON))).environment(run)
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert "PYTHONHOME" not in environment


def test_numpy_2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.metadata, "version", lambda name: "2.3.1")
    with pytest.raises(StartError, match=r"has 2\.3\.1: .*pip install 'numpy<2'"):
        check_numpy()


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.platform, "machine", lambda: "aarch64")
    with pytest.raises(StartError, match=r"this is linux aarch64.*container"):
        check_platform()


@pytest.mark.parametrize("libc", [("glibc", "2.31"), ("", "")])
def test_another_libc_is_refused(libc: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(installation.platform, "libc_ver", lambda: libc)
    with pytest.raises(StartError, match=r"needs glibc 2\.35"):
        check_platform()


def test_a_python_without_its_shared_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation.sysconfig, "get_config_var", lambda name: str(tmp_path))
    monkeypatch.setattr(installation.sys, "base_prefix", str(tmp_path))
    with pytest.raises(StartError, match=f"install the package libpython{PYTHON}.*--enable-shared"):
        shared_libpython()
