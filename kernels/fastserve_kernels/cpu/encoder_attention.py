"""`ops.varlen_attention` on a CPU: torch's own attention, sequence by sequence.

torch's kernel (flash attention, arXiv 2205.14135) takes views of the ragged batch as they lie, so no token is
copied to be padded, and a call takes some microseconds beside the linears' milliseconds. A window is computed
in blocks of queries with the keys that any of them sees: the time grows with the length, not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BLOCK_QUERIES = 256
"""Queries of a block where there is a window."""


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    bias: Tensor | None,
) -> Tensor:
    """`ops.varlen_attention`."""
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    starts = cu_seqlens.tolist()
    masks = _Masks(q, window, bias)
    for start, end in pairwise(starts):
        for queries, keys in _blocks(start, end, window):
            attended = scaled_dot_product_attention(
                _heads(q, queries),
                _heads(k, keys),
                _heads(v, keys),
                attn_mask=masks.between(queries, keys),
                scale=scale,
            )
            out[queries] = attended[0].transpose(0, 1)
    return out


def _heads(x: Tensor, rows: slice) -> Tensor:
    """Tokens of x [T, H, D] as torch's attention takes them: [1, H, tokens, D]."""
    return x[rows].transpose(0, 1)[None]


def _blocks(start: int, end: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Queries of the sequence that lies in these rows, and the keys that some of them see."""
    if window is None or end - start <= BLOCK_QUERIES:
        yield slice(start, end), slice(start, end)
        return
    for first in range(start, end, BLOCK_QUERIES):
        last = min(first + BLOCK_QUERIES, end)
        yield slice(first, last), slice(max(start, first - window), min(end, last + window))


class _Masks:
    """What is added to the scores. It depends on distances alone, so one table serves all sequences."""

    def __init__(self, q: Tensor, window: int | None, bias: Tensor | None) -> None:
        self._q = q
        self._window = window
        self._bias = bias

    def between(self, queries: slice, keys: slice) -> Tensor | None:
        """[1, H or 1, queries, keys] of the dtype of q; None: nothing is."""
        num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
        if self._bias is None and (self._window is None or max(num_queries, num_keys) <= self._window + 1):
            return None
        # Rows of a Toeplitz matrix are windows of the row of all distances: the last query's come first.
        nearest = keys.start - (queries.stop - 1)
        by_distance = self._by_distance(torch.arange(nearest, nearest + num_queries + num_keys - 1))
        return by_distance.unfold(1, num_keys, 1).flip(1)[None]

    def _by_distance(self, distance: Tensor) -> Tensor:
        """[H or 1, number of distances]."""
        if self._bias is None:
            added = self._q.new_zeros(1, len(distance))
        else:
            farthest = self._bias.shape[1] // 2
            added = self._bias[:, distance.clamp(-farthest, farthest) + farthest]
        if self._window is not None:
            added = added.masked_fill(distance.abs() > self._window, float("-inf"))
        return added
