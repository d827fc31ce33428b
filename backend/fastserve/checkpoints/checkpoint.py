"""What the loading of a decoder needs of a checkpoint, whatever its file format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fastserve_kernels.formats import Weight


class Checkpoint(Protocol):
    """Named tensors, read one at a time. The names are those of transformers' Llama."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor, by name."""

    @property
    def dtype(self) -> torch.dtype:
        """In which to serve it, unless the operator says otherwise."""

    def read(self, name: str, destination: Tensor) -> None:
        """Writes a tensor into `destination` of the same shape, converted to its dtype."""

    def read_packed(self, name: str, exact: bool) -> Weight | None:
        """A matrix in the format in which the file holds it; None if that is numbers, or if we compute in no
        such format.

        `exact`: with scales that are not rounded beyond float32.
        """
