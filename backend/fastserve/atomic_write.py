"""Files and directories that appear whole or not at all, and errors that say why one cannot be written.

Nobody who reads `path` ever sees half of it, and a failure leaves nothing behind. A process that is killed
leaves a file or directory whose name ends in UNFINISHED, which nothing reads.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust (safetensors) end the message of an error that the system gave them."""


class WriteError(Exception):
    """A file or directory that cannot be written; the sentence names the path and the cause, and on a full
    disk the bytes that are needed and free."""


@contextmanager
def atomic_write(path: Path, size: int | None = None, mode: int = 0o666) -> Iterator[Path]:
    """Gives a path beside `path` to write to; that file becomes `path` when the block ends.

    It has the permissions `mode`, less what the umask takes, from its first byte on. `size` is how many bytes
    it will have, if that is known. Raises WriteError if the system refuses.
    """
    unfinished = _unfinished(path)
    try:
        with write_errors(path, size):
            unfinished.unlink(missing_ok=True)  # one that a killed process of this number left has its own
            unfinished.touch(mode)
            permissions = unfinished.stat().st_mode
            yield unfinished
            # safetensors 0.8 makes files that nobody but their owner may read, the server's user included.
            unfinished.chmod(permissions)
            os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all. Raises WriteError."""
    with atomic_write(path, len(content)) as unfinished:
        unfinished.write_bytes(content)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Gives an empty directory beside `path`; it becomes `path`, which must not exist, when the block ends.

    Its files are on the disk by then, not only in memory. Raises WriteError if the system refuses to make,
    sync or rename it; what the block writes is its own to explain.
    """
    unfinished = _unfinished(path)
    with write_errors(path):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    try:
        yield unfinished
        with write_errors(path):
            for directory in (*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished):
                sync(directory)
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync(directory: Path) -> None:
    """Returns when the files directly in a directory would outlast a loss of power. Raises OSError."""
    for entry in (*sorted(file for file in directory.iterdir() if file.is_file()), directory):
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def write_errors(path: Path, size: int | None = None) -> Iterator[None]:
    """Raises WriteError in place of the error that the system, or a library that it refused, raises in the
    block; other errors pass.

    `size` is how many bytes `path` needs, if that is known.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        raise WriteError(_sentence(path, number, size)) from error


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")


def _error_number(error: BaseException | None) -> int | None:
    """That of the system's error which an exception is, tells of, or was raised in the handling of."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if told := _OS_ERROR.search(str(error)):
            return int(told[1])
        error = error.__cause__ or error.__context__
    return None


def _sentence(path: Path, number: int, size: int | None) -> str:
    sentence = f"{path}: cannot be written: {os.strerror(number)}"
    if number not in _FULL:
        return sentence
    needed = "" if size is None else f"it needs {size:,} bytes, "
    return f"{sentence} ({needed}{_free(path.parent):,} are free there)"


def _free(directory: Path) -> int:
    """Bytes that may still be written to a directory, or to the nearest above it that there is."""
    above = (directory.absolute(), *directory.absolute().parents)
    existing = next(folder for folder in above if folder.is_dir())
    return shutil.disk_usage(existing).free
