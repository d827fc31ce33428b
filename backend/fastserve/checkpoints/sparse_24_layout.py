"""2:4 sparsity of weights that a checkpoint stores with their zeros, so that other programs can read them.

Newer versions of compressed-tensors have no sparse layouts, and vLLM refuses a checkpoint that names one. So
`config.json` lists the sparse modules under `fastserve_two_of_four`, which other programs pass over.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fastserve.checkpoints.compressed_checkpoint import Layout, ModuleTensors
from fastserve_kernels.formats import Dense, Int4, Sparse24, Sparse24Int4, Weight
from fastserve_kernels.formats.weight import pack_pairs, unpack_pairs

CONFIG_KEY = "fastserve_two_of_four"


class Sparse24Layout:
    """A `Layout`: the modules of `names` are made sparse, whether dense or in the layout `others`."""

    def __init__(self, names: Collection[str], others: Layout | None) -> None:
        self._names = frozenset(names)
        self._others = others

    def applies_to(self, module: ModuleTensors) -> bool:
        """Whether it is to be made sparse, or is quantized."""
        return module.name in self._names or self._other(module) is not None

    def weight_shape(self, module: ModuleTensors) -> tuple[int, int]:
        """[N, K]. Raises ValueError if the module has no weight."""
        other = self._other(module)
        return module.shape("weight") if other is None else other.weight_shape(module)

    def load_weight(self, module: ModuleTensors) -> Weight:
        """The weight without its zeros, if the module is to be sparse.

        Raises ValueError if it is not 2:4 sparse, or not in the layout that it should have.
        """
        other = self._other(module)
        weight = Dense(module.tensor("weight")) if other is None else other.load_weight(module)
        return to_sparse_24(weight) if module.name in self._names else weight

    def _other(self, module: ModuleTensors) -> Layout | None:
        return self._others if self._others is not None and self._others.applies_to(module) else None


def to_sparse_24(weight: Weight) -> Sparse24 | Sparse24Int4:
    """A weight [N, K] with at most two nonzeros in each four columns, in a format that stores two of four.

    Raises ValueError if there are more, if 8 does not divide K, or if its format has no 2:4 counterpart.
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
    """A 2:4 sparse weight [N, K] as one that stores its zeros too, number for number."""
    if isinstance(weight, Sparse24):
        return Dense(weight.dequantize().to(weight.values.dtype))
    unscaled = Sparse24Int4(weight.codes, weight.indices, torch.ones_like(weight.scales), weight.group_size)
    return Int4(pack_pairs(unscaled.dequantize() + 8), weight.scales, None, weight.group_size)


def _keep_two(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The values [N, K / 2] and indices [N, K / 8] of `Sparse24` for a matrix [N, K] that has its zeros.

    `Sparse24.pack` gives the same and takes twice as long, since it sorts magnitudes; it also drops a third
    nonzero instead of refusing.
    """
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
