"""Reads linear layers and other tensors of a checkpoint, fused and packed as they come: never is much more
than one copy in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve import heap
from fastserve.checkpoints.checkpoint import Checkpoint
from fastserve.checkpoints.online_quantization import quantize
from fastserve.checkpoints.weight_rows import stack_rows
from fastserve.checkpoints.weight_shards import shard_columns
from fastserve.models.linear import Linear, LocalLinear, MixedFormatLinear
from fastserve_kernels.formats import Dense, Weight
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.preparation import QUANTIZES_ACTIVATIONS, prepare

Quantize = Callable[[str, Tensor, str], Weight]
ELEMENTS_AT_ONCE = 1 << 19
"""Of a matrix that is quantized when it is loaded."""
TRIM_EVERY = 16
"""Pieces: what rounding has freed lies between what is kept, and goes back to the system only so."""


@dataclass(frozen=True)
class LinearReader:
    """Reads tensors that are known to be there, for one dtype and device."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    quantization: str
    """As `load_model` has it."""
    quantizes_activations: Callable[[], bool]
    """See `prepare`; it is asked if a weight can have them so."""

    def linear(
        self, has_bias: bool, *names: str, quantize: Quantize = quantize, columns: range | None = None
    ) -> LocalLinear:
        """The linear layers of these names as one: their rows one below the other.

        `columns`: adjacent ones, of a rank; they are quantized as the whole weight is. None: all.
        """
        weights = stack_rows(self._weights([f"{name}.weight" for name in names], quantize))
        if columns is not None:
            weights = [shard_columns(weight, columns) for weight in weights]
        biases: Sequence[Tensor | None] = [None] * len(weights)
        if has_bias:
            bias = self.fused(*(f"{name}.bias" for name in names))
            biases = bias.split([weight.out_features for weight in weights])
        parts = [Linear(self._prepare(weight), part) for weight, part in zip(weights, biases, strict=True)]
        return parts[0] if len(parts) == 1 else MixedFormatLinear(tuple(parts))

    def fused(self, *names: str) -> Tensor:
        """The tensors of these names, one below the other, read straight into the place where they stay."""
        shapes = [self.checkpoint.shapes[name] for name in names]
        rows = [shape[0] for shape in shapes]
        fused = torch.empty(sum(rows), *shapes[0][1:], dtype=self.dtype, device=self.device)
        for name, part in zip(names, fused.split(rows), strict=True):
            self.checkpoint.read(name, part)
        return fused

    def _pieces(self, name: str) -> Iterator[Tensor]:
        """The rows of a matrix, some at a time: to round them takes several times their memory."""
        num_rows, width = self.checkpoint.shapes[name]
        step = max(1, ELEMENTS_AT_ONCE // width)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # heads are read whole
            yield from self.fused(name).split(step)
            return
        for first in range(0, num_rows, step):
            rows = range(first, min(first + step, num_rows))
            piece = torch.empty(len(rows), width, dtype=self.dtype, device=self.device)
            self.checkpoint.read(name, piece, rows)
            yield piece
            if first // step % TRIM_EVERY == TRIM_EVERY - 1:
                heap.trim()

    def _prepare(self, weight: Weight) -> Prepared:
        can_be = isinstance(weight, QUANTIZES_ACTIVATIONS)
        return prepare(weight, self.device, self.dtype, can_be and self.quantizes_activations())

    def _weights(self, names: list[str], quantize: Quantize) -> list[Weight]:
        """The matrices of these names, from the first rows of the fused one to the last; fused already where
        all are numbers."""
        if self.quantization == "none":
            return [quantize(names[0], self.fused(*names), "none")]
        if self.quantization != "auto":
            return stack_rows(
                [quantize(name, piece, self.quantization) for name in names for piece in self._pieces(name)]
            )
        exact = self.dtype == torch.float32
        packed = [self.checkpoint.read_packed(name, exact) for name in names]
        if all(weight is None for weight in packed):
            return [Dense(self.fused(*names))]
        return [
            Dense(self.fused(name)) if weight is None else weight
            for name, weight in zip(names, packed, strict=True)
        ]
