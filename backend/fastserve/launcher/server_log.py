"""The server's log: all of it in a file, and on the terminal what the operator must see."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from pathlib import Path

LOGS_KEPT = 10
"""Logs of earlier runs that are kept, with this one."""
MAX_LOG_BYTES = 64 << 20
"""Size at which the log is rotated: its content moves to one file beside it."""
_INFO = re.compile(r"I\d{4} ")
_TABLE = ("+", "|")
HARMLESS = (
    # What the server says of a machine without a GPU.
    "CUDA driver version is insufficient",
    "no pinned memory pool",
    "CudaDriverHelper has not been initialized",
    "Failed to initialize NVML",
    "DCGM unable to start",
    # The supervisor's own request to leave, when nothing is in flight, and that connections are still open.
    "Signal (15) received",
    "Exit timeout expired. Exiting immediately.",
)


def is_notable(line: str) -> bool:
    """Whether a line is a warning, an error, or something that a model printed."""
    if not line.strip() or line.startswith(_TABLE) or _INFO.match(line):
        return False
    return not any(text in line for text in HARMLESS)


class ServerLog:
    """Follows the log file that the server and its models append to."""

    def __init__(self, path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
        """Makes the file if there is none, and keeps it from `new_log` of other launchers."""
        self.path = path
        self._max_bytes = max_bytes
        self._file = path.open("ab+", buffering=0)
        # Shared: a test, or a second follower, may open it too.
        fcntl.flock(self._file, fcntl.LOCK_SH)
        self._position = 0

    def new_lines(self) -> list[str]:
        """The whole lines that have come since the last call."""
        self._file.seek(self._position)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        if self._position >= self._max_bytes and len(whole) == len(data):
            self._rotate()
        return whole.decode(errors="replace").splitlines()

    def last_lines(self, count: int) -> list[str]:
        """The last lines, without the tables that the server draws."""
        lines = self.path.read_text(errors="replace").splitlines()
        return [line for line in lines if line.strip() and not line.startswith(_TABLE)][-count:]

    def size(self) -> int:
        """Bytes in the file now."""
        return os.fstat(self._file.fileno()).st_size

    def _rotate(self) -> None:
        # Copied, not renamed: the server holds the file open, and goes on at its end wherever that is.
        self._file.seek(0)
        with _rotated(self.path).open("wb") as earlier:
            shutil.copyfileobj(self._file, earlier)
            self._file.truncate(0)
        self._position = 0


def new_log(directory: Path, run: str) -> ServerLog:
    """The log of the run of that name, which begins now; of earlier runs' logs the latest are kept.

    Raises OSError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    logs = sorted(directory.glob("server-*.log"), reverse=True)  # by name, and so by time
    for path in logs[LOGS_KEPT - 1 :]:
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its launcher lives
            path.unlink()
            _rotated(path).unlink(missing_ok=True)
    return ServerLog(directory / f"server-{time.strftime('%Y%m%d-%H%M%S')}-{run}.log")


def _rotated(path: Path) -> Path:
    return path.with_name(path.name + ".1")
