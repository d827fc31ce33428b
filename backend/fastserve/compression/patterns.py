"""Which weights pruning leaves out, and the format that holds those it keeps.

| pattern | of what the cheapest are left out | format |
|---|---|---|
| `unstructured` | single weights | `Bitmap` |
| `rows` | whole rows | `Bitmap` |
| `2:4` | single weights, two of each four adjacent columns | `Sparse24` |
| `block 32x64` | blocks of 32 rows and 64 columns | `BlockSparse` |

The type of a weight says that it was pruned: `mask_of` reads the pattern back from it, and `repack` puts new
values in the same places.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

from fastserve_kernels.formats import Bitmap, BlockSparse, Dense, Sparse24, Sparse24Int4, Weight

PatternName = Annotated[
    str, Meta(pattern=r"^(unstructured|rows|2:4|block (16|32|64|128)x(16|32|64|128))$")
]
"""A pattern as a recipe spells it; a block's rows come first."""
Scope = Literal["row", "matrix"]
"""What is compared with what: the tiles of one row of tiles, or all of a matrix."""


@dataclass(frozen=True)
class Tiles:
    """The cheapest tiles of some rows and columns are left out; None is all of the matrix's columns."""

    rows: int = 1
    columns: int | None = 1

    def check(self, shape: tuple[int, int]) -> None:
        """Raises ValueError if a weight [N, K] does not divide into the tiles."""
        if shape[0] % self.rows or shape[1] % (self.columns or 1):
            raise ValueError(f"blocks of {self.rows}x{self.columns} do not divide a weight of {shape}")

    def choose(self, costs: Tensor, sparsity: float, scope: Scope = "matrix") -> Tensor:
        """A mask [N, K] bool, true where a weight is kept, given what leaving each out costs [N, K].

        A tile costs what its weights cost together. Of each scope's tiles `round(sparsity * tiles)` go.
        """
        tile_costs = self.sums(costs)
        each = tile_costs if scope == "row" else tile_costs.flatten()[None]
        kept = torch.ones_like(each, dtype=torch.bool)
        cheapest = each.topk(round(sparsity * each.shape[1]), dim=1, largest=False, sorted=False).indices
        kept.scatter_(1, cheapest, False)
        return self.spread(kept.view_as(tile_costs), costs.shape[1])

    def sums(self, values: Tensor) -> Tensor:
        """The sum over each tile [N / rows, K / columns] of values [N, K]."""
        columns = self.columns or values.shape[1]
        return values if self == UNSTRUCTURED else _tiles(values, self.rows, columns).sum((-1, -2))

    def spread(self, tiles: Tensor, width: int) -> Tensor:
        """One value per tile [N / rows, K / columns] as one per weight [N, K], K being the width."""
        columns = self.columns or width
        return tiles.repeat_interleave(self.rows, 0).repeat_interleave(columns, 1)

    def pack(self, weight: Tensor, mask: Tensor) -> Weight:
        """The weight where the mask is true."""
        if self.rows == 1:
            return Bitmap.pack(weight, mask)
        assert self.columns is not None
        return repack(BlockSparse.pack(mask.to(weight.dtype), (self.rows, self.columns)), weight)


@dataclass(frozen=True)
class TwoOfFour:
    """The cheaper two of each four adjacent columns are left out."""

    def check(self, shape: tuple[int, int]) -> None:
        """Raises ValueError if `Sparse24` cannot hold a weight [N, K]."""
        if shape[1] % 8:
            raise ValueError(f"2:4 needs columns in multiples of 8, not a weight of {shape}")

    def choose(self, costs: Tensor, sparsity: float = 0.5, scope: Scope = "row") -> Tensor:
        """As `Tiles.choose`. The sparsity is a half whatever the scope."""
        fours = costs.unflatten(1, (-1, 4))
        kept = torch.ones_like(fours, dtype=torch.bool)
        kept.scatter_(-1, fours.topk(2, dim=-1, largest=False).indices, False)
        return kept.flatten(1)

    def pack(self, weight: Tensor, mask: Tensor) -> Weight:
        """The weight where the mask is true."""
        return repack(Sparse24.pack(mask.to(weight.dtype)), weight)


Pattern = Tiles | TwoOfFour
UNSTRUCTURED = Tiles()
ROWS = Tiles(1, None)


def parse_pattern(name: str) -> Pattern:
    """The pattern of a `PatternName`."""
    if name.startswith("block "):
        rows, columns = name.removeprefix("block ").split("x")
        return Tiles(int(rows), int(columns))
    named: dict[str, Pattern] = {"unstructured": UNSTRUCTURED, "rows": ROWS, "2:4": TwoOfFour()}
    return named[name]


def mask_of(weight: Weight) -> Tensor | None:
    """A mask [N, K] bool, true where the weight's pattern keeps one; None if its format leaves none out."""
    match weight:
        case Bitmap() | Sparse24():
            ones = dataclasses.replace(weight, values=torch.ones_like(weight.values))
        case Sparse24Int4():
            values = torch.ones(weight.out_features, weight.in_features // 2, device=weight.device)
            ones = Sparse24(values, weight.indices)
        case BlockSparse():
            ones = dataclasses.replace(weight, blocks=torch.ones_like(weight.blocks))
        case _:
            return None
    return ones.dequantize().bool()


def repack(like: Weight, dense: Tensor) -> Weight:
    """New values [N, K] in the pattern and the dtype of a weight; what the pattern leaves out is dropped.

    Raises TypeError if the weight holds codes or factors.
    """
    mask = mask_of(like)
    match like:
        case Dense():
            return Dense(dense.to(like.weight.dtype))
        case Bitmap() | Sparse24() if mask is not None:
            return dataclasses.replace(like, values=dense[mask].view_as(like.values).to(like.values.dtype))
        case BlockSparse() if mask is not None:
            _, rows, columns = like.blocks.shape
            kept = _tiles(mask, rows, columns)[..., 0, 0]
            return dataclasses.replace(like, blocks=_tiles(dense, rows, columns)[kept].to(like.blocks.dtype))
    raise TypeError(f"a weight of the format {type(like).__name__} takes no new values")


def _tiles(values: Tensor, rows: int, columns: int) -> Tensor:
    """[N / rows, K / columns, rows, columns] of [N, K]."""
    return values.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
