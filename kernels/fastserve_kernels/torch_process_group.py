"""Ranks of torch.distributed: gloo for CPUs of several machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastserve_kernels.process_group import HEADER_WORDS, RankLostError, read_header, write_header


class GlooProcessGroup:
    """A `ProcessGroup` over gloo. Ranks may be threads of one process too.

    gloo's own sum begins at another rank for each part of a tensor, so that from three ranks on a row's bits
    depend on the batch: here all ranks get all summands and add them up in order.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> None:
        """`store`: where ranks find one another, a `TCPStore` say; `timeout`: of each call."""
        self.rank = rank
        self.world_size = world_size
        self._group: Any = dist.ProcessGroupGloo(store, rank, world_size, timeout)
        self._is_aborted = False

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `ProcessGroup`."""
        parts = self._all_gather(x.contiguous(), [x.shape] * self.world_size)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        return total.to(x.dtype)

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """See `ProcessGroup`. Parts are filled up to the widest: gloo takes equal ones."""
        widest = max(widths)
        padded = torch.nn.functional.pad(x, (0, widest - x.shape[1]))
        parts = self._all_gather(padded, [padded.shape] * self.world_size)
        if self.rank != 0:
            return x
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def broadcast(self, x: Tensor | None) -> Tensor:
        """See `ProcessGroup`."""
        header = torch.zeros(HEADER_WORDS, dtype=torch.int64)
        if x is not None:
            write_header(header, x)
        self._broadcast(header)
        dtype, shape = read_header(header)
        result = torch.empty(shape, dtype=dtype) if x is None else x.contiguous()
        self._broadcast(result.view(torch.uint8))
        return result

    def check(self) -> None:
        """See `ProcessGroup`."""
        if self._is_aborted:
            raise RankLostError("a rank of the group has ended")

    def abort(self) -> None:
        """See `ProcessGroup`."""
        self._is_aborted = True
        self._group.abort()

    def _broadcast(self, tensor: Tensor) -> None:
        self._wait(lambda: self._group.broadcast(tensor, 0))

    def _all_gather(self, x: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        # As bytes: gloo has no sums to compute, and does not know every dtype.
        parts = [torch.empty(shape, dtype=x.dtype) for shape in shapes]
        outputs = [[part.view(torch.uint8) for part in parts]]
        self._wait(lambda: self._group.allgather(outputs, [x.view(torch.uint8)]))
        return parts

    def _wait(self, start: Callable[[], dist.Work]) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise RankLostError(f"a rank of the group cannot be reached: {error}") from error
