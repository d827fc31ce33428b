"""2:4 sparsity of weights that are stored with their zeros, as other programs read them.

The sparse layouts of compressed-tensors are gone from its newer versions, and vLLM refuses a checkpoint that
names them. So `config.json` names the modules under `fastserve_two_of_four`, which others pass over.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fastserve.checkpoints.compressed_checkpoint import Layout, StoredModule
from fastserve_kernels.formats import Dense, Int4, Sparse24, Sparse24Int4, Weight
from fastserve_kernels.formats.weight import pack_pairs, unpack_pairs

CONFIG_KEY = "fastserve_two_of_four"


class Sparse24Layout:
    """A `Layout` of the modules that are named, and of those of another layout."""

    def __init__(self, names: Collection[str], others: Layout | None) -> None:
        self._names = frozenset(names)
        self._others = others

    def holds(self, module: StoredModule) -> bool:
        return module.name in self._names or self._other(module) is not None

    def shape(self, module: StoredModule) -> tuple[int, int]:
        other = self._other(module)
        return module.shape("weight") if other is None else other.shape(module)

    def weight(self, module: StoredModule) -> Weight:
        other = self._other(module)
        weight = Dense(module.tensor("weight")) if other is None else other.weight(module)
        return to_sparse_24(weight) if module.name in self._names else weight

    def _other(self, module: StoredModule) -> Layout | None:
        return self._others if self._others is not None and self._others.holds(module) else None


def to_sparse_24(weight: Weight) -> Sparse24 | Sparse24Int4:
    """A weight of which at most two of each four columns are not zero, without the others.

    Raises ValueError if more are, or if there is no 2:4 format of its kind.
    """
    if isinstance(weight, Dense):
        return Sparse24(*_keep_two(weight.weight))
    if isinstance(weight, Int4) and weight.zeros is None:
        values, indices = _keep_two(unpack_pairs(weight.codes).to(torch.int8) - 8)
        return Sparse24Int4(pack_pairs(values + 8), indices, weight.scales, weight.group_size)
    raise ValueError(
        f"{CONFIG_KEY} names it, but it is {type(weight).__name__}; allowed: numbers, and symmetric codes of "
        "up to 4 bits"
    )


def from_sparse_24(weight: Sparse24 | Sparse24Int4) -> Dense | Int4:
    """The reverse."""
    if isinstance(weight, Sparse24):
        return Dense(weight.dequantize().to(weight.values.dtype))
    unscaled = Sparse24Int4(weight.codes, weight.indices, torch.ones_like(weight.scales), weight.group_size)
    return Int4(pack_pairs(unscaled.dequantize() + 8), weight.scales, None, weight.group_size)


def _keep_two(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The values and indices of `Sparse24` for a matrix [N, K] that has its zeros."""
    if weight.shape[1] % 8:
        raise ValueError(f"{CONFIG_KEY} names it, but its {weight.shape[1]} columns are no multiple of 8")
    fours = weight.unflatten(1, (-1, 4))
    # Four booleans are the bytes of a word, lowest first; their bits move together in its lowest four.
    words = (weight != 0).view(torch.int32)
    masks = (words | words >> 7 | words >> 14 | words >> 21) & 15
    columns = torch.tensor([_two_columns(mask) for mask in range(16)], device=weight.device)[masks]
    if (columns < 0).any():
        raise ValueError(f"{CONFIG_KEY} names it, but more than two of some four columns are not zero")
    return fours.gather(-1, columns).flatten(1), pack_pairs(columns[..., 0] | columns[..., 1] << 2)


def _two_columns(mask: int) -> list[int]:
    """The two columns to keep of four, ascending: those of the mask's bits, filled up with the first others;
    [-1, -1] if it has more bits."""
    kept = [column for column in range(4) if mask >> column & 1]
    others = [column for column in range(4) if not mask >> column & 1]
    return sorted((kept + others)[:2]) if len(kept) <= 2 else [-1, -1]
