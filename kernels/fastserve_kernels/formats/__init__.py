"""The formats of a linear layer's weight. `preparation.prepare` packs one for a device; its type picks the
operator.

| format | bits per weight (bfloat16, G = 128) | |
|---|---|---|
| `Dense` | 16 | |
| `Int4`, `NF4` | 4.125 | groups of columns share a scale |
| `Int8`, `FP8` | 8.125 | groups of columns share a scale |
| `IntRows` | 2.125 to 8.125 | groups of columns share a scale, bits by row |
| `W8A8` | 8 | the activations are rounded to eight bits too |
| `Sparse24` | 9 | two of four columns |
| `Sparse24Int4` | 3.125 | two of four columns, in four bits |
| `BlockSparse` | 16 times the density | blocks |
| `Bitmap` | 1 + 16 times the density | single weights |
| `LowRank` | 16 R (1 / N + 1 / K) | two thin matrices |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastserve_kernels.formats.int_rows import IntRows
from fastserve_kernels.formats.quantized import FP8, LARGEST_FP8, NF4, NORMAL_FLOAT_4, W8A8, Int4, Int8
from fastserve_kernels.formats.sparse import Bitmap, BlockSparse, Sparse24, Sparse24Int4
from fastserve_kernels.formats.weight import FLOATS, MatrixWeight, Weight, check_tensor, check_weight

__all__ = [
    "FP8",
    "LARGEST_FP8",
    "NF4",
    "NORMAL_FLOAT_4",
    "W8A8",
    "Bitmap",
    "BlockSparse",
    "Dense",
    "Int4",
    "Int8",
    "IntRows",
    "LowRank",
    "Sparse24",
    "Sparse24Int4",
    "Weight",
]


@dataclass(frozen=True, eq=False)
class Dense(MatrixWeight):
    """An ordinary weight."""

    weight: Tensor
    """[N, K] float32, float16 or bfloat16."""

    operator: ClassVar[str] = "linear"

    def _check(self) -> None:
        check_tensor("Dense.weight", self.weight, ("N", "K"), FLOATS)

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """What the operator takes between x and bias, in the plain layout."""
        return (self.weight,)

    def dequantize(self) -> Tensor:
        """The weight: [N, K] float32."""
        return self.weight.float()


@dataclass(frozen=True, eq=False)
class LowRank(Weight):
    """w = up @ down."""

    down: Tensor
    """[R, K] float32, float16 or bfloat16."""
    up: Tensor
    """[N, R] of the same dtype."""

    operator: ClassVar[str] = "linear_low_rank"

    @classmethod
    def pack(cls, weight: Tensor, rank: int) -> LowRank:
        """The product of this rank that is nearest to a float weight [N, K]: its truncated singular value
        decomposition (Eckart and Young, 1936), the root of each singular value in either factor.

        Raises ValueError if the weight is no finite float matrix, or the rank not from 1 to min(N, K).
        """
        weight = check_weight(weight)
        if not 1 <= rank <= min(weight.shape):
            raise ValueError(f"rank must be from 1 to {min(weight.shape)}, not {rank}")
        left, singular, right = torch.linalg.svd(weight.float(), full_matrices=False)
        root = singular[:rank].sqrt()
        down, up = root[:, None] * right[:rank], left[:, :rank] * root
        return cls(down.to(weight.dtype), up.to(weight.dtype))

    def _check(self) -> None:
        rank, _ = check_tensor("LowRank.down", self.down, ("R", "K"), FLOATS)
        check_tensor("LowRank.up", self.up, ("N", rank), (self.down.dtype,))

    @property
    def out_features(self) -> int:
        """N."""
        return self.up.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.down.shape[1]

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """What the operator takes between x and bias, in the plain layout."""
        return (self.down, self.up)

    def dequantize(self) -> Tensor:
        """up @ down: [N, K] float32."""
        return self.up.float() @ self.down.float()
