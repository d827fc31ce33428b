"""The interface between a checkpoint, whatever its file format, and the loader of a decoder."""

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
        """The shape of every tensor, by name, as it is when it is dequantized."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to serve it in, unless the operator says otherwise. Raises ModelError if it has none."""

    def read(self, name: str, destination: Tensor, rows: range | None = None) -> None:
        """Writes a tensor into `destination` of the same shape, converted to its dtype.

        `rows`: adjacent ones, whole heads of a projection, which `destination` is for; None: all.
        """

    def read_packed(self, name: str, exact: bool, rows: range | None = None) -> Weight | None:
        """A matrix [N, K] in the format in which the file holds it; None for ordinary numbers, and for codes
        that no format of ours holds, which `read` dequantizes.

        `exact`: scales are rounded no further than to float32. `rows`: see `read`. Raises ModelError for
        wrong tensors.
        """
