"""The server's log: all of it in a file, and on the terminal what the operator must see."""

from __future__ import annotations

import re
from pathlib import Path

_INFO = re.compile(r"I\d{4} ")
_TABLE = ("+", "|")
HARMLESS = (
    # What the server says of a machine without a GPU.
    "CUDA driver version is insufficient",
    "no pinned memory pool",
    "CudaDriverHelper has not been initialized",
    "Failed to initialize NVML",
    "DCGM unable to start",
    # The supervisor's own request to stop.
    "Signal (15) received",
)


def worth_showing(line: str) -> bool:
    """Whether a line is a warning, an error, or something that a model printed."""
    if not line.strip() or line.startswith(_TABLE) or _INFO.match(line):
        return False
    return not any(text in line for text in HARMLESS)


class ServerLog:
    """Follows the log file that the server and its models write to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0

    def new_lines(self) -> list[str]:
        """The whole lines that have come since the last call."""
        with self.path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        return whole.decode(errors="replace").splitlines()

    def last_lines(self, count: int) -> list[str]:
        """The last lines, without the tables that the server draws."""
        lines = self.path.read_text(errors="replace").splitlines()
        return [line for line in lines if line.strip() and not line.startswith(_TABLE)][-count:]
