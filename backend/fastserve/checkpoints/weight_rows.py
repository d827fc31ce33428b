"""Rows of weights in any format: to select some, or to fuse several weights, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels.formats import BlockSparse, Int4, Int8, IntRows, LowRank, Weight
from fastserve_kernels.formats.weight_io import weight_tensors

_SHARED = ("codebook",)
"""Tensors that all rows share."""
_STARTS = "row_starts"
"""Where each row's part of the other tensors begins, and last the end."""


def select_rows(weight: Int4 | Int8, rows: Tensor) -> Int4 | Int8:
    """The weight whose row i is row rows[i] of this one; rows is int64."""
    selected: dict[str, Any] = {name: tensor[rows] for name, tensor in weight_tensors(weight)[0].items()}
    return replace(weight, **selected)


def stack_rows(weights: Sequence[Weight]) -> list[Weight]:
    """The weights one below the other, in as few as hold them: neighbours of one format become one."""
    return [_stack(list(alike)) for _, alike in groupby(weights, key=_fusion_key)]


def _stack(weights: Sequence[Weight]) -> Weight:
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, IntRows):
        return _stack_int_rows([weight for weight in weights if isinstance(weight, IntRows)])
    stacked: dict[str, Any] = {
        name: _join(name, [getattr(weight, name) for weight in weights]) for name in weight_tensors(first)[0]
    }
    if isinstance(first, BlockSparse):
        stacked["shape"] = (sum(weight.out_features for weight in weights), first.in_features)
    return replace(first, **stacked)


def _stack_int_rows(weights: Sequence[IntRows]) -> IntRows:
    """The weights as one, packed anew: codes of `IntRows` are ordered by their bits, not by their rows."""
    codes, zeros = zip(*(weight.codes() for weight in weights), strict=True)
    return IntRows.from_codes(
        torch.cat(codes),
        torch.cat([weight.bits for weight in weights]),
        torch.cat([weight.scales for weight in weights]),
        None if weights[0].symmetric else torch.cat(zeros),
    )


def _join(name: str, parts: list[Tensor]) -> Tensor:
    if name in _SHARED:
        return parts[0]
    if name != _STARTS:
        return torch.cat(parts)
    joined = parts[0]
    for part in parts[1:]:
        joined = torch.cat((joined, part[1:] + joined[-1]))
    return joined


def _fusion_key(weight: Weight) -> object:
    """A key that is equal for weights that can be fused; it has their dtypes, so that nothing is rounded."""
    if isinstance(weight, LowRank):  # each has a matrix of its own for all of its rows
        return id(weight)
    tensors = weight_tensors(weight)[0]
    symmetric = weight.symmetric if isinstance(weight, IntRows) else None
    shapes = tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in tensors.items())
    shared = tuple(tuple(tensors[name].tolist()) for name in _SHARED if name in tensors)
    return type(weight), weight.in_features, getattr(weight, "group_size", None), symmetric, shapes, shared
