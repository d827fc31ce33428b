"""Rows of weights that are no ordinary tensors: to choose some, take them apart, put one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels.formats import BlockSparse, Int4, Int8, IntRows, LowRank, Weight
from fastserve_kernels.weight import pack_pairs

_SHARED = ("codebook",)
"""Tensors that belong to all rows."""
_STARTS = "row_starts"
"""Where each row's part of the other tensors begins, and last the end."""


def select_rows(weight: Int4 | Int8, rows: Tensor) -> Int4 | Int8:
    """The weight whose row i is row rows[i] of this one; rows is int64."""
    selected: dict[str, Any] = {name: tensor[rows] for name, tensor in _tensors(weight).items()}
    return replace(weight, **selected)


def split_rows(weights: Sequence[Weight]) -> tuple[list[Weight], Tensor | None]:
    """The weights one below the other with those of `IntRows` taken apart, for which no device has a kernel:
    into rows that `Int4` holds and others. Also which row of the result each row has become, int64; None:
    that which it was.
    """
    if not any(isinstance(weight, IntRows) for weight in weights):
        return list(weights), None
    pieces: list[tuple[Weight, Tensor]] = []
    start = 0
    for weight in weights:
        parts = _int4_and_int8(weight) if isinstance(weight, IntRows) else [(weight, _all_rows(weight))]
        pieces += [(part, start + rows) for part, rows in parts]
        start += weight.out_features
    pieces.sort(key=lambda piece: type(piece[0]).__name__)  # neighbours of one kind become one
    return [part for part, _ in pieces], torch.cat([rows for _, rows in pieces]).argsort()


def _int4_and_int8(weight: IntRows) -> list[tuple[Weight, Tensor]]:
    """The weights and which rows they are."""
    plain = weight.int8()
    fits = (weight.bits <= 4) & (weight.in_features % 2 == 0)
    narrow, wide = fits.nonzero()[:, 0], (~fits).nonzero()[:, 0]
    parts: list[tuple[Weight, Tensor]] = []
    if len(narrow):
        chosen = select_rows(plain, narrow)
        assert isinstance(chosen, Int8)
        zeros = None if chosen.zeros is None else chosen.zeros + 8
        parts.append((Int4(pack_pairs(chosen.values + 8), chosen.scales, zeros, weight.group_size), narrow))
    if len(wide):
        parts.append((select_rows(plain, wide), wide))
    return parts


def _all_rows(weight: Weight) -> Tensor:
    return torch.arange(weight.out_features, device=weight.device)


def stack_rows(weights: Sequence[Weight]) -> list[Weight]:
    """The weights one below the other, as few as hold them: neighbours of one kind become one weight."""
    return [_stack(list(alike)) for _, alike in groupby(weights, key=_kind)]


def _stack(weights: Sequence[Weight]) -> Weight:
    first = weights[0]
    if len(weights) == 1:
        return first
    stacked: dict[str, Any] = {
        name: _join(name, [getattr(weight, name) for weight in weights]) for name in _tensors(first)
    }
    if isinstance(first, BlockSparse):
        stacked["shape"] = (sum(weight.out_features for weight in weights), first.in_features)
    return replace(first, **stacked)


def _join(name: str, parts: list[Tensor]) -> Tensor:
    if name in _SHARED:
        return parts[0]
    if name != _STARTS:
        return torch.cat(parts)
    joined = parts[0]
    for part in parts[1:]:
        joined = torch.cat((joined, part[1:] + joined[-1]))
    return joined


def _tensors(weight: Weight) -> dict[str, Tensor]:
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _kind(weight: Weight) -> object:
    """What is equal for two weights that can be stacked; their dtypes too, so that nothing is rounded."""
    if isinstance(weight, LowRank):  # each has a matrix of its own for all of its rows
        return id(weight)
    tensors = _tensors(weight)
    shapes = tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in tensors.items())
    shared = tuple(tuple(tensors[name].tolist()) for name in _SHARED if name in tensors)
    return type(weight), weight.in_features, getattr(weight, "group_size", None), shapes, shared
