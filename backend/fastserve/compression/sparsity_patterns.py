"""Sparsity patterns: which weights pruning leaves out, and the format that holds those it keeps.

| pattern | what of least saliency is left out | format |
|---|---|---|
| `unstructured` | single weights | `Bitmap` |
| `rows` | whole rows | `Bitmap` |
| `2:4` (N:M) | single weights, two of each four adjacent columns | `Sparse24` |
| `block 32x64` | blocks of 32 rows and 64 columns | `BlockSparse` |

The type of a weight says that it was pruned: `mask_of` reads from it which weights are kept, and `repack`
puts new values in their places.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

from fastserve_kernels.formats import Bitmap, BlockSparse, Dense, Sparse24, Sparse24Int4, Weight

PatternName = Annotated[
    str,
    Meta(
        pattern=r"^(unstructured|rows|2:4|block (16|32|64|128)x(16|32|64|128))$",
        description="`unstructured`, `rows`, `2:4`, or `block RxC` of 16, 32, 64 or 128 rows and columns",
    ),
]
Scope = Literal["row", "matrix"]
"""Where saliencies are compared: within a row, or the whole matrix (Wanda's comparison group)."""


@dataclass(frozen=True)
class BlockPattern:
    """Leaves out the blocks of least saliency, which is the mean of their weights' saliencies."""

    rows: int
    columns: int | None
    """None: all columns of the matrix."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if a weight of shape [N, K] does not divide into blocks."""
        if shape[0] % self.rows or shape[1] % (self.columns or 1):
            raise ValueError(f"blocks of {self.rows}x{self.columns} do not divide {shape[0]}x{shape[1]}")

    def mask(self, saliency: Tensor, sparsity: float, scope: Scope = "matrix") -> Tensor:
        """A mask [N, K] bool, true where a weight is kept, given the saliency of each [N, K].

        Of the blocks of a scope, `round(sparsity * blocks)` go.
        """
        of_blocks = self.block_means(saliency)
        scopes = of_blocks if scope == "row" else of_blocks.flatten()[None]
        out = round(sparsity * scopes.shape[1])
        cheapest = scopes.topk(out, dim=1, largest=False, sorted=False).indices
        kept = torch.ones_like(scopes, dtype=torch.bool).scatter_(1, cheapest, False)
        return self.expand_blocks(kept.view_as(of_blocks), saliency.shape[1])

    def block_means(self, saliency: Tensor) -> Tensor:
        """The mean [N / rows, K / columns] of each block of a saliency [N, K]."""
        return saliency if self == UNSTRUCTURED else self._split(saliency).mean((-1, -2))

    def expand_blocks(self, blocks: Tensor, width: int) -> Tensor:
        """One value per block [N / rows, K / columns] as one per weight [N, K], K being the width."""
        return blocks.repeat_interleave(self.rows, 0).repeat_interleave(self.columns or width, 1)

    def pack(self, weight: Tensor, mask: Tensor) -> Weight:
        """A weight [N, K] where the mask is true."""
        if self.rows == 1:
            return Bitmap.pack(weight, mask)
        assert self.columns is not None
        return repack(BlockSparse.pack(mask.to(weight.dtype), (self.rows, self.columns)), weight)

    def _split(self, values: Tensor) -> Tensor:
        """[N / rows, K / columns, rows, columns] of values [N, K]."""
        columns = self.columns or values.shape[1]
        return values.unflatten(1, (-1, columns)).unflatten(0, (-1, self.rows)).transpose(1, 2)


@dataclass(frozen=True)
class TwoOfFour:
    """Leaves out two of each four adjacent columns: N:M sparsity as GPUs have it."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if `Sparse24` cannot hold a weight of shape [N, K]."""
        if shape[1] % 8:
            raise ValueError(f"the columns of {shape[0]}x{shape[1]} are no multiple of 8")

    def mask(self, saliency: Tensor, sparsity: float = 0.5, scope: Scope = "matrix") -> Tensor:
        """A mask [N, K] bool, true where a weight is kept, given the saliency of each [N, K].

        The sparsity is a half and competes within four columns: neither argument changes anything.
        """
        fours = saliency.unflatten(1, (-1, 4))
        cheapest = fours.topk(2, dim=-1, largest=False).indices
        return torch.ones_like(fours, dtype=torch.bool).scatter_(-1, cheapest, False).flatten(1)

    def pack(self, weight: Tensor, mask: Tensor) -> Weight:
        """A weight [N, K] where the mask is true."""
        return repack(Sparse24.pack(mask.to(weight.dtype)), weight)


Pattern = BlockPattern | TwoOfFour
UNSTRUCTURED = BlockPattern(1, 1)
ROWS = BlockPattern(1, None)


def parse_pattern(name: str) -> Pattern:
    """The pattern of a `PatternName`."""
    if name.startswith("block "):
        rows, columns = name.removeprefix("block ").split("x")
        return BlockPattern(int(rows), int(columns))
    named: dict[str, Pattern] = {"unstructured": UNSTRUCTURED, "rows": ROWS, "2:4": TwoOfFour()}
    return named[name]


def mask_of(weight: Weight) -> Tensor | None:
    """A mask [N, K] bool, true where a weight is kept; None if its format leaves none out."""
    match weight:
        case Bitmap() | Sparse24():
            ones: Weight = dataclasses.replace(weight, values=torch.ones_like(weight.values))
        case Sparse24Int4():
            kept = torch.ones(weight.out_features, weight.in_features // 2, device=weight.device)
            ones = Sparse24(kept, weight.indices)
        case BlockSparse():
            ones = dataclasses.replace(weight, blocks=torch.ones_like(weight.blocks))
        case _:
            return None
    return ones.dequantize().bool()


def repack(like: Weight, dense: Tensor) -> Weight:
    """New values [N, K] in the pattern and the dtype of a weight, which leaves some of them out.

    Raises TypeError if the weight holds codes or factors.
    """
    mask = mask_of(like)
    if isinstance(like, Dense):
        return Dense(dense.to(like.weight.dtype))
    if isinstance(like, Bitmap | Sparse24) and mask is not None:
        return dataclasses.replace(like, values=dense[mask].view_as(like.values).to(like.values.dtype))
    if isinstance(like, BlockSparse) and mask is not None:
        blocks = BlockPattern(like.blocks.shape[1], like.blocks.shape[2])
        kept = blocks._split(mask)[..., 0, 0]
        return dataclasses.replace(like, blocks=blocks._split(dense)[kept].to(like.blocks.dtype))
    raise TypeError(f"a weight of the format {type(like).__name__} takes no new values")
