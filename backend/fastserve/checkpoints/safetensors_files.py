"""The safetensors files of a Hugging Face directory, and what their headers say.

Imports no torch: processes that never load it ask for the shapes of tensors with the help of this module.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fastserve.checkpoints.lfs_pointer import refuse_lfs_pointer
from fastserve.checkpoints.model_error import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(directory: Path) -> list[Path]:
    """The files with a model's weights: the single one where it is there, whatever an index says (as in
    transformers), else those that the index names.

    Raises ModelError if there are none, or if one is missing.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.is_file():
        raise ModelError(f"{directory}: has neither {SINGLE} nor {INDEX}; FastServe reads safetensors only")
    refuse_lfs_pointer(index)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of safetensors files: {error!r}") from error
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(f"{directory}: {INDEX} names files that are not there: {', '.join(missing)}")
    return [directory / name for name in names]


def open_safetensors(path: Path, framework: str) -> safe_open:
    """A memory-mapped file that gives tensors of `framework`: "pt" or "numpy".

    Raises ModelError if it is no safetensors file, or a pointer of Git LFS.
    """
    refuse_lfs_pointer(path)
    try:
        return safe_open(path, framework=framework)
    except SafetensorError as error:
        raise ModelError(f"{path}: {error}") from error


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by name, from the files' headers. Raises ModelError for unreadable files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(directory):
        with open_safetensors(path, "numpy") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes
