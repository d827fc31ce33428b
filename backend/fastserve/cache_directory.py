"""The cache directory, where FastServe keeps what it fetches, converts and logs.

`$XDG_CACHE_HOME/fastserve`, else `~/.cache/fastserve`; a user's directory under the temporary one where those
cannot be written, as in a container with a read-only file system or for a user without a home.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import sys
import tempfile
from pathlib import Path

from fastserve.start_error import StartError


def cache_directory() -> Path:
    """The directory to write to, which exists then. Raises StartError if none can be written."""
    candidates = _candidates()
    for directory in candidates:
        if _is_usable(directory):
            if directory != candidates[0]:
                _warn_once(f"fastserve: {candidates[0]} cannot be written; {directory} is used in its place")
            return directory
    tried = ", ".join(map(str, candidates)) or "no home and no temporary directory"
    raise StartError(f"cannot write to {tried}: make room there, or set XDG_CACHE_HOME")


def cache_path(name: str) -> Path:
    """The path of the entry `name` in the first cache that has it, else in the one to write to.

    Raises StartError if none has it and none can be written.
    """
    found = (directory / name for directory in _candidates() if _is_own(directory))
    return next((path for path in found if path.exists()), None) or cache_directory() / name


def _candidates() -> list[Path]:
    """The directories that are considered, the best first."""
    candidates = []
    root = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # no HOME; a user id that has no name has no home either
        candidates.append((Path(root) if root else Path.home() / ".cache").absolute() / "fastserve")
    with contextlib.suppress(FileNotFoundError):  # no temporary directory can be written
        candidates.append(_temporary())
    return candidates


def _temporary() -> Path:
    return Path(tempfile.gettempdir()).absolute() / f"fastserve-{os.getuid()}"


def _is_usable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK) and _is_own(directory)


def _is_own(directory: Path) -> bool:
    """Whether nobody else may have prepared it: in the temporary directory, everybody can make ours."""
    try:
        if directory != _temporary():
            return True
        state = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid()


@functools.cache
def _warn_once(line: str) -> None:
    print(line, file=sys.stderr)
