"""Linear layers of a decoder, on weights that are arranged for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve_kernels import ops
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.process_group import ProcessGroup


@dataclass(frozen=True)
class Linear:
    """A weight [N, K] and its bias [N]."""

    weight: Prepared
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K]: x W^T + b, [T, N], in the dtype of x."""
        return ops.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class MixedFormatLinear:
    """A linear layer whose rows are held in several formats, as in a checkpoint that gives each its own."""

    parts: tuple[Linear, ...]
    """The linear layers whose rows lie one below the other, the first ones first."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K]: x W^T + b, [T, N]."""
        return torch.cat([part(x) for part in self.parts], dim=1)


LocalLinear = Linear | MixedFormatLinear
"""What one rank computes by itself: a whole layer, or, column-parallel, some of its rows."""


@dataclass(frozen=True)
class RowParallelLinear:
    """A linear layer of which each rank has some columns, and the input that belongs to them."""

    linear: LocalLinear
    """Its bias is on rank 0 alone."""
    group: ProcessGroup

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K of this rank]: the sum of all ranks' products, [T, N], the same on each."""
        return self.group.all_reduce(self.linear(x))


@dataclass(frozen=True)
class ParallelLMHead:
    """The head, of which each rank has the rows of some token ids."""

    linear: LocalLinear
    group: ProcessGroup
    widths: Sequence[int]
    """How many token ids each rank has."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden]: all scores [T, vocab] on rank 0, and its own on another rank."""
        return self.group.gather(self.linear(x), self.widths)


@dataclass(frozen=True)
class VocabParallelEmbedding:
    """The embedding, of which each rank has the rows of some token ids."""

    weight: Tensor
    """[token ids of this rank, hidden]."""
    first: int
    """The first of them."""
    group: ProcessGroup

    def __getitem__(self, token_ids: Tensor) -> Tensor:
        """The embeddings [T, hidden] of token ids [T]."""
        rows = token_ids - self.first
        is_other = (rows < 0) | (rows >= len(self.weight))
        embedded = self.weight[rows.masked_fill_(is_other, 0)]
        return self.group.all_reduce(embedded.masked_fill_(is_other[:, None], 0))


AnyLinear = Linear | MixedFormatLinear | RowParallelLinear | ParallelLMHead


def parts_of(linear: AnyLinear) -> tuple[Linear, ...]:
    """The linear layers of one weight that it consists of."""
    local = linear.linear if isinstance(linear, RowParallelLinear | ParallelLMHead) else linear
    return (local,) if isinstance(local, Linear) else local.parts
