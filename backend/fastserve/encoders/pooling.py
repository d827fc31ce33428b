"""From the hidden states of a sequence's tokens to one vector, in the ways of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def pool(hidden: Tensor, cu_seqlens: Tensor, modes: Sequence[str]) -> Tensor:
    """Vectors [B, hidden * len(modes)] float32 of the sequences in `hidden` [T, hidden]; see `MODES`.

    Sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1], and has one at least.
    """
    return torch.cat([MODES[mode](hidden, cu_seqlens) for mode in modes], dim=1)


def _cls(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    return hidden[cu_seqlens[:-1]].float()


def _last(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    return hidden[cu_seqlens[1:] - 1].float()


def _max(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.segment_reduce(hidden.float(), "max", offsets=cu_seqlens)


def _sum(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.segment_reduce(hidden.float(), "sum", offsets=cu_seqlens)


def _lengths(cu_seqlens: Tensor) -> Tensor:
    """[B, 1] float32."""
    return cu_seqlens.diff().float()[:, None]


def _mean(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    return _sum(hidden, cu_seqlens) / _lengths(cu_seqlens)


def _mean_sqrt_len(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    return _sum(hidden, cu_seqlens) / _lengths(cu_seqlens).sqrt()


def _weighted_mean(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    before = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    weights = (torch.arange(len(hidden), device=hidden.device) - before + 1).float()[:, None]
    return _sum(hidden.float() * weights, cu_seqlens) / _sum(weights, cu_seqlens)


MODES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""The first token; the largest of each element; the mean; the sum over the root of their number; the mean in
which token i weighs i, counted from 1 (arXiv 2202.08904); the last token. In the order in which several of
them follow each other, by the names in sentence-transformers' files."""
