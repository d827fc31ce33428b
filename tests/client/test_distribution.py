"""`fastserve-client`, the client as a distribution of its own, and what the whole one carries."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
BLOCKED = ("torch", "transformers", "fastserve", "fastserve_kernels")


def build(project: Path, directory: Path) -> Path:
    """The wheel of a project. hatchling is called as pip would, without its environment apart."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(files.read(name).decode())


def top_level(wheel: Path) -> set[str]:
    """What it puts into an environment, but for its own description."""
    with zipfile.ZipFile(wheel) as files:
        first = {name.split("/")[0] for name in files.namelist()}
    return {name for name in first if not name.endswith(".dist-info")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(PROJECT / "client", tmp_path_factory.mktemp("client"))


def test_it_holds_the_client_and_nothing_else(wheel: Path) -> None:
    assert top_level(wheel) == {"fastserve_client"}
    source = PROJECT / "client" / "fastserve_client"
    wanted = {f"fastserve_client/{path.name}" for path in source.iterdir() if path.is_file()}
    with zipfile.ZipFile(wheel) as files:
        assert {name for name in files.namelist() if name.startswith("fastserve_client/")} == wanted
    assert "fastserve_client/py.typed" in wanted


def test_it_needs_neither_torch_nor_an_old_numpy(wheel: Path) -> None:
    needs = metadata(wheel).get_all("Requires-Dist") or []
    names = {need.split(";")[0].split(">")[0].split("[")[0].strip() for need in needs}
    assert names == {"tritonclient", "grpcio", "aiohttp", "numpy"}
    assert not [need for need in needs if "<" in need.split(";")[0]]


def test_it_imports_where_nothing_of_the_server_is_installed(wheel: Path, tmp_path: Path) -> None:
    """Without `site` no .pth file is read, so the package is that of the wheel and not of this project."""
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path)
    installed = [path for path in sys.path if path.endswith("site-packages")]
    program = f"""
import sys
sys.path[:0] = {[str(tmp_path), *installed]!r}
sys.modules.update(dict.fromkeys({BLOCKED!r}))  # importing one of them raises ImportError
import fastserve_client
assert fastserve_client.__file__.startswith({str(tmp_path)!r}), fastserve_client.__file__
with fastserve_client.Client("127.0.0.1:1") as client:
    assert not client.is_ready()
"""
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_whole_distribution_carries_it_too_in_the_same_version(wheel: Path, tmp_path: Path) -> None:
    whole = build(PROJECT, tmp_path)
    assert top_level(whole) == {"fastserve", "fastserve_kernels", "fastserve_client"}
    assert metadata(whole)["Version"] == metadata(wheel)["Version"]
