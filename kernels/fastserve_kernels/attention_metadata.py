"""What the attention of a step must know about its batch: built once, shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor, Tensor]
"""query_start, context_lens and block_tables of `AttentionMetadata`: what attention itself reads of it."""


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """A ragged batch of B sequences with T tokens in all; those of a sequence lie together, in order.

    A sequence's tokens of this step are the last `query_len` of its `context_len` positions.
    """

    query_start: Tensor
    """[B + 1] int64: the tokens of sequence i are rows query_start[i] to query_start[i + 1]."""
    context_lens: Tensor
    """[B] int64: keys of each sequence, those of this step included."""
    block_tables: Tensor
    """[B, most blocks of a sequence] int64: the blocks of each, padded with block 0."""
    positions: Tensor
    """[T] int64: where each token stands in its sequence."""
    slot_mapping: Tensor
    """[T] int64: where each token's key and value go: block * block_size + offset."""
    block_size: int

    @classmethod
    def build(
        cls,
        query_lens: list[int],
        context_lens: list[int],
        block_tables: list[list[int]],
        block_size: int,
        device: torch.device | str,
    ) -> AttentionMetadata:
        """Raises ValueError if a sequence has no tokens, fewer keys than tokens, or too few blocks."""
        query = np.asarray(query_lens, dtype=np.int64)
        context = np.asarray(context_lens, dtype=np.int64)
        held = np.fromiter(map(len, block_tables), dtype=np.int64, count=len(block_tables))
        if not len(query) == len(context) == len(held):
            raise ValueError(
                f"{len(query)} query_lens, {len(context)} context_lens, {len(held)} block_tables"
            )
        if (query < 1).any() or (context < query).any() or (held * block_size < context).any():
            raise ValueError(
                "each sequence needs 1 <= query_len <= context_len <= len(block_table) * block_size"
            )
        tables = np.zeros((len(held), int(held.max(initial=0))), dtype=np.int64)
        tables[np.arange(tables.shape[1]) < held[:, None]] = np.fromiter(
            (block for table in block_tables for block in table), dtype=np.int64, count=int(held.sum())
        )
        start = np.concatenate(([0], np.cumsum(query)))
        sequence = np.repeat(np.arange(len(query)), query)
        positions = np.arange(start[-1]) + (context - start[1:])[sequence]
        slots = tables[sequence, positions // block_size] * block_size + positions % block_size

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return cls(
            query_start=tensor(start),
            context_lens=tensor(context),
            block_tables=tensor(tables),
            positions=tensor(positions),
            slot_mapping=tensor(slots),
            block_size=block_size,
        )
