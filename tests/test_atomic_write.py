"""Files and directories appear whole or not at all, and a refusal of the system becomes a sentence."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastserve.atomic_write import WriteError, atomic_directory, atomic_write, write_bytes, write_errors

LIMITED = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from fastserve.atomic_write import WriteError, atomic_write

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
tensor = torch.zeros(1 << 16)
try:
    with atomic_write(Path(sys.argv[1]), tensor.nbytes) as path:
        if sys.argv[2] == "safetensors":
            save_file({"tensor": tensor}, path)
        else:
            torch.save(tensor, open(path, "wb"))
except WriteError as error:
    print(error)
"""
"""Writes more than the system lets this process write: what the two libraries raise then is no OSError."""


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with atomic_write(path) as unfinished:
        unfinished.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    """So that a server that runs as another user can read a checkpoint."""
    (tmp_path / "any").touch()
    with atomic_write(tmp_path / "file") as unfinished:
        save_file({"tensor": torch.zeros(1)}, unfinished)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_a_block_that_fails_leaves_the_file_that_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises((KeyError, KeyboardInterrupt, WriteError)), atomic_write(path) as unfinished:  # noqa: PT012
        unfinished.write_text("half")
        raise error
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_a_sentence_with_the_path_and_the_bytes_needed(
    tmp_path: Path, full_disk: Callable[[], None]
) -> None:
    path = tmp_path / "file"
    full_disk()
    with pytest.raises(WriteError) as caught:
        write_bytes(path, bytes(1234))
    assert str(caught.value).startswith(f"{path}: cannot be written: No space left on device (it needs 1,234")
    assert str(caught.value).endswith(" are free there)")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_refusal_of_the_system_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), write_errors(tmp_path):
        raise ValueError("mine")


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_libraries_that_hide_the_systems_error_are_understood(library: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    words = [sys.executable, "-c", LIMITED, str(path), library]
    finished = subprocess.run(words, capture_output=True, text=True)
    assert finished.stdout == f"{path}: cannot be written: File too large\n", finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    with pytest.raises(KeyError), atomic_directory(path) as unfinished:  # noqa: PT012
        (unfinished / "file").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(path) as unfinished:
        (unfinished / "file").write_text("whole")
        assert not path.exists()
    assert (path / "file").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_where_nothing_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "within", tmp_path / "none" / "within"):
        with pytest.raises(WriteError, match=f"^{path}: cannot be written: No"):
            write_bytes(path, b"")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on nothing can be written."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill() -> None:
        monkeypatch.setattr(Path, "write_bytes", refuse)

    return fill


def test_a_directory_is_on_the_disk_with_all_that_lies_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    with atomic_directory(tmp_path / "whole") as unfinished:
        (unfinished / "inner").mkdir()
        (unfinished / "inner" / "file").write_text("content")
    written = (tmp_path / "whole", tmp_path / "whole" / "inner", tmp_path / "whole" / "inner" / "file")
    assert synced == {path.stat().st_ino for path in written}
