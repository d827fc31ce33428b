"""Pointers of Git LFS: what a clone without `git lfs` has in place of large files."""

from __future__ import annotations

from pathlib import Path

from fastserve.checkpoints.model_error import ModelError

_START = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path) -> None:
    """Raises ModelError if the file is a pointer of Git LFS; passes if there is no such file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        is_pointer = file.read(len(_START)) == _START
    if is_pointer:
        raise ModelError(
            f"{path}: a pointer of Git LFS, not the file itself. Fetch the files: `git lfs pull` in "
            f"{path.parent}, or `hf download` of the model"
        )
