"""What ranks, the processes that compute one model together, say to one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

HEADER_WORDS = 8
"""Of what is broadcast: the number of its dtype, how many dimensions, and these."""
BROADCAST_DTYPES = (torch.int64, torch.float32, torch.float16, torch.bfloat16)


class RankLostError(Exception):
    """A process of the group is gone: what was computed since is wrong, and the group is of no more use."""


class ProcessGroup(Protocol):
    """Every rank calls the same functions in the same order, with tensors of the same rows and dtype.

    Sums are float32, in the order of the ranks, and rounded once: all ranks get the same bits, and a row's
    bits do not depend on what other rows there are. The functions raise RankLostError.
    """

    @property
    def rank(self) -> int:
        """From 0 to `world_size` - 1."""

    @property
    def world_size(self) -> int:
        """How many ranks there are."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks of x [T, D] float32, float16 or bfloat16."""

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """On rank 0 all ranks' x [T, widths[rank]], side by side: [T, sum of widths]; on the others x."""

    def broadcast(self, x: Tensor | None) -> Tensor:
        """Rank 0's tensor of any shape and of a dtype of `BROADCAST_DTYPES`; the others give None."""

    def check(self) -> None:
        """Raises RankLostError if a rank is gone, for recorded steps, which do not say so themselves."""

    def abort(self) -> None:
        """Lets nobody wait any more; any thread may call it. Raises nothing."""


def write_header(header: Tensor, x: Tensor) -> None:
    """Writes into header [HEADER_WORDS] int64 what `read_header` reads."""
    numbers = [BROADCAST_DTYPES.index(x.dtype), x.dim(), *x.shape]
    header[: len(numbers)] = torch.tensor(numbers)


def read_header(header: Tensor) -> tuple[torch.dtype, torch.Size]:
    """The dtype and the shape of what is broadcast."""
    kind, dim, *sizes = header.tolist()
    return BROADCAST_DTYPES[kind], torch.Size(sizes[:dim])
