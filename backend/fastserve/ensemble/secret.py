"""Marks what the steps of this server say to one another, so that a client's imitation of it is refused.

Triton server 2.51 closes no model to clients. But the stubs of all models are children of one `tritonserver`
process, and so they share a secret that is made anew with every start: a file in shared memory, readable by
this user only, that the first of them writes and the others read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import uuid
from functools import cache
from pathlib import Path

from fastserve.errors import RequestError

DIRECTORY = Path("/dev/shm")
"""Triton server's Python backend cannot run without it."""
SECRET_BYTES = 32
SEAL_BYTES = 16


def seal(name: str, data: bytes) -> bytes:
    """`data` with its mark in front. The mark holds for an input of that name only (16 characters at most).

    Keyed BLAKE2b over all of it: 0.5 us for a step's token, 7 us for a prompt of 1,000. A bare secret in
    front would not do: whoever calls `preprocess` directly is given what that step says to the next.
    """
    return _mark(name, data) + data


def unseal(name: str, sealed: bytes) -> memoryview:
    """What was sealed for an input of that name. Raises RequestError where this server has not sealed it."""
    data = memoryview(sealed)[SEAL_BYTES:]
    if not hmac.compare_digest(sealed[:SEAL_BYTES], _mark(name, data)):
        raise RequestError(
            f"`{name}`: got a message that is not of this server's own steps; allowed: none from a client,"
            " whose models are `fastserve` and `fastserve_infer`"
        )
    return data


def forwarded_id() -> str:
    """A new request id, for a request that a step forwards to `fastserve`; no client can make one."""
    name = uuid.uuid4().hex
    return f"{name}-{_mark('forwarded_id', name.encode()).hex()}"


def is_forwarded_id(request_id: str) -> bool:
    """Whether `forwarded_id` of this server has made it."""
    name, _, mark = request_id.partition("-")
    return hmac.compare_digest(mark.encode(), _mark("forwarded_id", name.encode()).hex().encode())


def _mark(name: str, data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=SEAL_BYTES, key=_secret(), person=name.encode()).digest()


def share_secret() -> None:
    """Makes the secret, or reads it, while there is shared memory for it: at the start."""
    _secret()


@cache
def _secret() -> bytes:
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
        _remove_those_of_the_dead()
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
    """Of a process, for ever: process ids come again, and containers may share the directory."""
    return f"{_prefix()}{pid}_{_start_time(pid)}"


def _prefix() -> str:
    return f"fastserve_secret_{os.stat('/proc/self/ns/pid').st_ino}_"


def _start_time(pid: int) -> str:
    """In clock ticks since the machine was started; empty: there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _remove_those_of_the_dead() -> None:
    for path in DIRECTORY.glob(f"{_prefix()}*"):
        pid, start_time, *_ = path.name.removeprefix(_prefix()).split("_")
        if _start_time(int(pid)) != start_time:
            path.unlink(missing_ok=True)
