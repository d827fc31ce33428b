"""Rows of low-bit weights: each tensor of `Int4` and `Int8` has a row for each row of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels.formats import Int4, Int8


def select_rows(weight: Int4 | Int8, rows: Tensor) -> Int4 | Int8:
    """The weight whose row i is row rows[i] of this one; rows is int64."""
    selected: dict[str, Any] = {name: tensor[rows] for name, tensor in _tensors(weight).items()}
    return replace(weight, **selected)


def stack_rows(weights: Sequence[Int4 | Int8 | None]) -> Int4 | Int8 | None:
    """The weights one below the other; None if they are not all of one kind."""
    first = weights[0]
    if first is None or len({_kind(weight) for weight in weights}) > 1:
        return None
    stacked: dict[str, Any] = {
        name: torch.cat([getattr(weight, name) for weight in weights]) for name in _tensors(first)
    }
    return replace(first, **stacked)


def _tensors(weight: Int4 | Int8) -> dict[str, Tensor]:
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _kind(weight: Int4 | Int8 | None) -> object:
    """What must be equal for two weights to be stacked; their dtypes too, so that nothing is rounded."""
    if weight is None:
        return None
    dtypes = tuple((name, tensor.dtype, tensor.shape[1]) for name, tensor in _tensors(weight).items())
    return type(weight), weight.group_size, dtypes
