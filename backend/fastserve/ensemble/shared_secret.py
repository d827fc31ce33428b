"""The secret by which the models of one server know one another's messages (`message_signature`).

The stubs of all models are children of one `tritonserver` process, and so they share a secret that is made
anew with every start: a file in shared memory, readable by this user only, that the first of them writes and
the others read.
"""

from __future__ import annotations

import os
import secrets
import stat
from functools import cache
from pathlib import Path

DIRECTORY = Path("/dev/shm")
"""Triton server's Python backend cannot run without it."""
SECRET_BYTES = 32


@cache
def server_secret() -> bytes:
    """The secret of the `tritonserver` that has started this process."""
    return shared_secret(os.getppid())


def shared_secret(pid: int) -> bytes:
    """The secret of all who name the same process. Raises PermissionError for a file of another user."""
    path = DIRECTORY / _file_name(pid)
    draft = DIRECTORY / f"{path.name}_{secrets.token_hex(8)}"
    draft.touch(mode=0o600, exist_ok=False)
    try:
        draft.write_bytes(secrets.token_bytes(SECRET_BYTES))
        os.link(draft, path)  # whole or not at all, and not where there is one
    except FileExistsError:
        pass
    else:
        _remove_stale_files()
    finally:
        draft.unlink()
    return _read(path)


def _read(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(f"{path}: its owner or its mode is not as this server makes it; remove it")
        return file.read()


def _file_name(pid: int) -> str:
    """The name for one process of all times: ids are used again, and containers may share the directory."""
    return f"{_prefix()}{pid}_{_start_time(pid)}"


def _prefix() -> str:
    return f"fastserve_secret_{os.stat('/proc/self/ns/pid').st_ino}_"


def _start_time(pid: int) -> str:
    """A process's start in clock ticks since boot; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _remove_stale_files() -> None:
    for path in DIRECTORY.glob(f"{_prefix()}*"):
        pid, start_time, *_ = path.name.removeprefix(_prefix()).split("_")
        if _start_time(int(pid)) != start_time:
            path.unlink(missing_ok=True)
