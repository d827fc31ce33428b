"""Which Triton server is started: one that is installed on this machine, else the embedded one.

The embedded server is in a wheel of NVIDIA's (`fastserve.assets`). Its Python backend runs a model in a
*stub*, a program that embeds libpython and so exists once per Python version.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fastserve.assets import server_files
from fastserve.launcher.ascii_paths import ascii_environment, python_prefix
from fastserve.launcher.run_directory import RunDirectory
from fastserve.start_error import StartError

EMBEDDED = "embedded"
CONTAINER_SERVER = Path("/opt/tritonserver/bin/tritonserver")
STUB = "triton_python_backend_stub"
GLIBC_NEEDED = (2, 35)
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Installation:
    """A Triton server that can run our models in the Python that runs this."""

    executable: Path
    directories: dict[str, Path]
    """Flags of `tritonserver` that say where its parts are."""
    libraries: tuple[Path, ...] = ()
    """Directories in front of LD_LIBRARY_PATH."""

    def environment(self, run: RunDirectory) -> dict[str, str]:
        """This process's environment, changed so that the stubs run in this process's Python environment."""
        environment = ascii_environment(run, os.environ)
        prefix = python_prefix(run)
        programs = prefix / "bin" if prefix else Path(sys.executable).parent
        # A stub finds its environment by the first `python3` on PATH.
        environment["PATH"] = _joined([programs], environment.get("PATH"))
        environment["LD_LIBRARY_PATH"] = _joined(self.libraries, environment.get("LD_LIBRARY_PATH"))
        environment.pop("PYTHONHOME", None)
        if prefix:
            environment["VIRTUAL_ENV"] = str(prefix)
        return environment


def server_installation(run: RunDirectory, program: str = "") -> Installation:
    """The server to start. `run` is where links to its parts go.

    `program` is the path of a `tritonserver`, or `embedded`; empty: the one on PATH, then the container's,
    then the embedded one. Raises StartError when that server cannot run here.
    """
    if program == EMBEDDED:
        return embedded_installation(run)
    if program:
        executable = shutil.which(program)
        if executable is None:
            raise StartError(f"no program {program!r}: give the path of a tritonserver, or `{EMBEDDED}`")
        return local_installation(Path(executable))
    executable = shutil.which("tritonserver") or shutil.which(CONTAINER_SERVER)
    return local_installation(Path(executable)) if executable else embedded_installation(run)


def local_installation(executable: Path) -> Installation:
    """A server that somebody installed, in the layout of NVIDIA's container: `bin`, `backends`, `caches`."""
    root = executable.resolve().parent.parent
    parts = {"backend-directory": root / "backends", "cache-directory": root / "caches"}
    stub = root / "backends" / "python" / STUB
    if not stub.is_file():
        raise StartError(
            f"{executable} has no Python backend ({stub} is missing): "
            f"install it there, or use the embedded server with --tritonserver {EMBEDDED}"
        )
    _check_python_of(stub)
    return Installation(executable, {option: path for option, path in parts.items() if path.is_dir()})


def embedded_installation(run: RunDirectory) -> Installation:
    """The server in NVIDIA's wheel, with the stub of the running Python beside its Python backend.

    All of it goes by links: the cache directory may have a path that the server cannot take.
    """
    check_platform()
    check_numpy()
    libpython = shared_libpython()
    files = server_files()
    root = run.link("server", files / "pytriton" / "tritonserver")
    stub = root / "python_backend_stubs" / PYTHON / STUB
    if not stub.is_file():
        raise StartError(
            f"the embedded Triton server has no stub for Python {PYTHON}: use a Python from 3.10 to 3.13"
        )
    for part in (*(root / "backends" / "python").iterdir(), stub):
        run.link(f"backends/python/{part.name}", part)
    # A link to libpython alone: its own folder may hold other libraries that the server must not pick up.
    run.link(f"lib/{libpython.name}", libpython)
    return Installation(
        executable=root / "bin" / "tritonserver",
        directories={"backend-directory": run.path / "backends", "cache-directory": root / "caches"},
        libraries=(run.link("libs", files / "nvidia_pytriton.libs"), run.path / "lib"),
    )


def check_platform() -> None:
    """Raises StartError where the embedded server's binaries do not run."""
    here = f"{sys.platform} {platform.machine()}"
    if here != "linux x86_64":
        raise StartError(
            f"the embedded Triton server runs on linux x86_64, this is {here}: "
            "start FastServe in NVIDIA's tritonserver container"
        )
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < GLIBC_NEEDED:
        raise StartError(
            f"the embedded Triton server needs glibc 2.35 or newer, this system has {library} {version}: "
            "use Debian 12, Ubuntu 22.04 or newer, or NVIDIA's tritonserver container"
        )


def check_numpy() -> None:
    """Raises StartError with numpy 2, which the embedded server's stub was not built for."""
    version = metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise StartError(
            f"the embedded Triton server needs numpy below 2, {sys.prefix} has {version}: "
            f"`{sys.executable} -m pip install 'numpy<2'`"
        )


def shared_libpython() -> Path:
    """The shared library of the running Python, which a stub is linked to. Raises StartError."""
    name = f"libpython{PYTHON}.so.1.0"
    library_directory = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    folders = [
        library_directory,
        library_directory / str(sysconfig.get_config_var("MULTIARCH") or ""),
        Path(sys.base_prefix) / "lib",
    ]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    looked_in = ", ".join(map(str, dict.fromkeys(folders)))
    raise StartError(
        f"{name}, which Triton server's Python backend needs, is not in {looked_in}: install the package "
        f"libpython{PYTHON} (Debian, Ubuntu), or a Python that was built with --enable-shared"
    )


def _check_python_of(stub: Path) -> None:
    match = re.search(rb"libpython(\d+\.\d+)\.so", stub.read_bytes())
    if match and match[1].decode() != PYTHON:
        raise StartError(
            f"{stub} runs Python {match[1].decode()}, FastServe is installed in Python {PYTHON}: "
            f"install it in that Python, or use the embedded server with --tritonserver {EMBEDDED}"
        )


def _joined(first: list[Path] | tuple[Path, ...], rest: str | None) -> str:
    return os.pathsep.join([*map(str, first), *([rest] if rest else [])])
