"""Where numba keeps the compiled kernels."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CACHE_VARIABLE = "NUMBA_CACHE_DIR"


def choose_cache_directory(sources: Path) -> None:
    """Sets NUMBA_CACHE_DIR where numba itself would find no place. Call it before numba is imported.

    numba takes `__pycache__` beside the sources, else the user's cache, and raises where neither can be
    written: there, a directory of this user's in the temporary one is used.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if (
        CACHE_VARIABLE in os.environ
        or _is_usable(sources / "__pycache__")
        or _is_usable(Path(caches, "numba"))
    ):
        return
    directory = Path(tempfile.gettempdir(), f"fastserve-kernels-{os.getuid()}")
    if not _is_usable(directory) or directory.is_symlink() or directory.stat().st_uid != os.getuid():
        # Somebody else has prepared it: what lies there is executed.
        directory = Path(tempfile.mkdtemp(prefix="fastserve-kernels-"))
    os.environ[CACHE_VARIABLE] = str(directory)


def _is_usable(directory: Path) -> bool:
    if not directory.is_absolute():  # of a user without a home, `~` stands for itself
        return False
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK)
