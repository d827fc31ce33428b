"""What one run of the launcher leaves on this machine, and how it goes when that was killed.

It lies in /dev/shm beside the server's regions: always writable where a server can run at all, and under a
name of plain characters. The links in it give plain names to everything else, since the server puts paths
into a shell's command line and into lists that it splits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
from pathlib import Path

from fastserve.launcher.start_checks import SHARED_MEMORY
from fastserve.start_error import StartError

PREFIX = "fastserve_"
UNFINISHED = "fastserve-unfinished_"


class RunDirectory:
    """A directory that is locked while this process lives, however it ends."""

    def __init__(self) -> None:
        """Makes the directory, after removing what no live process owns. Raises StartError."""
        remove_stale_runs()
        name = secrets.token_hex(4)
        unfinished = SHARED_MEMORY / f"{UNFINISHED}{name}"
        try:
            unfinished.mkdir(mode=0o700)
            self._lock = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise StartError(f"cannot write to {SHARED_MEMORY}: {error.strerror}") from error
        # Locked before it has the name under which others look for dead ones.
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = unfinished.rename(SHARED_MEMORY / f"{PREFIX}{name}")

    @property
    def region_prefix(self) -> str:
        """What the names of this run's shared-memory regions begin with."""
        return f"{self.path.name}_"

    def link(self, name: str, target: Path) -> Path:
        """A new link in this directory; any target has a path of plain characters through it."""
        link = self.path / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target.absolute())
        return link

    def remove(self) -> None:
        """Removes the directory and the run's regions."""
        _remove(self.path)
        os.close(self._lock)


def remove_regions(prefix: str) -> None:
    """Removes the shared-memory regions whose names begin so."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            region.unlink()


def remove_stale_runs() -> None:
    """Removes the directories and the regions of this user's runs whose launcher is gone."""
    for path in SHARED_MEMORY.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another launcher removes it at this moment
            state = path.lstat()
            if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid():
                _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        # Refused with an OSError while the launcher lives, in another container too.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    # The directory last: without it nobody would know that its regions may go.
    remove_regions(f"{path.name}_")
    shutil.rmtree(path, ignore_errors=True)
