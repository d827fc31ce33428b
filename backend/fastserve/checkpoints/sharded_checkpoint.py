"""The part of a checkpoint that one of several ranks reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastserve.checkpoints.checkpoint import Checkpoint
from fastserve_kernels.formats import Weight

RowsOf = Callable[[str], range | None]
"""The rows of a tensor that the rank has, by its name; None: all."""


class ShardedCheckpoint:
    """A `Checkpoint` of some rows of some tensors; nothing else is read of these."""

    def __init__(self, checkpoint: Checkpoint, rows_of: RowsOf) -> None:
        self._checkpoint = checkpoint
        self._rows_of = rows_of
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: shape if (rows := rows_of(name)) is None else (len(rows), *shape[1:])
            for name, shape in checkpoint.shapes.items()
        }

    @property
    def dtype(self) -> torch.dtype:
        """See `Checkpoint`."""
        return self._checkpoint.dtype

    def read(self, name: str, destination: Tensor, rows: range | None = None) -> None:
        """See `Checkpoint`. `rows`: of this rank's."""
        self._checkpoint.read(name, destination, self._inner(name, rows))

    def read_packed(self, name: str, exact: bool, rows: range | None = None) -> Weight | None:
        """See `Checkpoint`. `rows`: of this rank's."""
        return self._checkpoint.read_packed(name, exact, self._inner(name, rows))

    def _inner(self, name: str, rows: range | None) -> range | None:
        mine = self._rows_of(name)
        if mine is None or rows is None:
            return mine if rows is None else rows
        return mine[rows.start : rows.stop]
