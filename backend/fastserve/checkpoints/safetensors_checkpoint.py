"""A Hugging Face directory: `config.json`, and one safetensors file or several with an index."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.safetensors_files import open_safetensors, weight_files

MAPPED_BYTES = 64 << 20
"""Bytes that are read of a mapped file before it is opened anew: what was read stays in the process's memory
until the file is closed."""
_BODY = ("embed_tokens.", "layers.", "norm.")
"""The beginnings of tensor names where a decoder was saved without its head."""
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class SafetensorsCheckpoint:
    """A `Checkpoint` whose tensors are read from memory-mapped files, each when it is asked for."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelError if a file is missing or is no safetensors file."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored_at: dict[str, tuple[Path, str]] = {}
        self._dtype_of: dict[str, str] = {}
        for path in weight_files(directory):
            file = open_safetensors(path, "pt")
            names = file.keys()
            for stored_name in names:
                tensor, name = file.get_slice(stored_name), _full_name(stored_name)
                self._stored_at[name] = path, stored_name
                self.shapes[name] = tuple(tensor.get_shape())
                self._dtype_of[name] = tensor.get_dtype()
        self._directory = directory
        self._opened: tuple[Path, safe_open] | None = None
        self._bytes_read = 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the largest tensor. Raises ModelError if we do not compute in it."""
        return self.dtype_of(self.shapes)

    def dtype_of(self, names: Iterable[str]) -> torch.dtype:
        """The dtype of the largest of these tensors. Raises ModelError if we do not compute in it."""
        largest = max(names, key=lambda name: prod(self.shapes[name]))
        dtype = _DTYPES.get(self._dtype_of[largest])
        if dtype is None:
            raise ModelError(
                f"{self._directory}: {largest} is {self._dtype_of[largest]}; name a dtype to serve it in"
            )
        return dtype

    def read(self, name: str, destination: Tensor, rows: range | None = None) -> None:
        """See `Checkpoint`."""
        destination.copy_(self.tensor(name, rows))

    def tensor(self, name: str, rows: range | None = None) -> Tensor:
        """A tensor as the file holds it, or some rows of it, on the CPU."""
        path, stored_name = self._stored_at[name]
        if self._opened is None or self._opened[0] != path or self._bytes_read > MAPPED_BYTES:
            self._opened, self._bytes_read = None, 0
            self._opened = path, open_safetensors(path, "pt")
        if rows is None:
            tensor = self._opened[1].get_tensor(stored_name)
        else:
            tensor = self._opened[1].get_slice(stored_name)[rows.start : rows.stop]
        self._bytes_read += tensor.nbytes
        return tensor

    def read_packed(self, name: str, exact: bool, rows: range | None = None) -> None:
        """None: these files hold ordinary numbers."""


def _full_name(name: str) -> str:
    """The name of a tensor in a model with its head: a checkpoint of the body alone lacks the prefix."""
    return f"model.{name}" if name.startswith(_BODY) else name
