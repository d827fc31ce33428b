"""The project's own layout of a weight in a safetensors file: its dataclass, field by field.

Each tensor field of `fastserve_kernels.formats` is stored under its name, and what else the dataclass holds
in a JSON object: `{"format": "Int4", "group_size": 64}`. A tensor that the format may lack and the weight
does lack is not stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastserve_kernels import formats
from fastserve_kernels.formats import Weight

FORMATS: dict[str, type[Weight]] = {
    kind.__name__: kind
    for kind in (
        formats.Dense,
        formats.Int4,
        formats.Int8,
        formats.IntRows,
        formats.NF4,
        formats.FP8,
        formats.W8A8,
        formats.Sparse24,
        formats.Sparse24Int4,
        formats.BlockSparse,
        formats.Bitmap,
        formats.LowRank,
    )
}


def tensor_fields(name: str) -> tuple[str, ...]:
    """The fields of a format that are tensors."""
    return tuple(field.name for field in dataclasses.fields(FORMATS[name]) if "Tensor" in str(field.type))


def weight_tensors(weight: Weight) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a weight by field, and its entry as JSON has it."""
    fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    tensors = {name: value.contiguous() for name, value in fields.items() if isinstance(value, Tensor)}
    entry: dict[str, Any] = {"format": type(weight).__name__}
    for name, value in fields.items():
        if not isinstance(value, Tensor) and value is not None:
            entry[name] = list(value) if isinstance(value, tuple) else value
    return tensors, entry


def weight_from_tensors(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Weight:
    """The reverse. Raises ValueError for an unknown format, and for fields that are missing or wrong."""
    kind = FORMATS.get(entry.get("format", ""))
    if kind is None:
        raise ValueError(f"format: got {entry.get('format')!r}; allowed: {', '.join(FORMATS)}")
    given = {name: value for name, value in entry.items() if name != "format"} | dict(tensors)
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    for field in dataclasses.fields(kind):
        if field.name not in values and "None" in str(field.type):
            values[field.name] = None
    names = {field.name for field in dataclasses.fields(kind)}
    if values.keys() != names:
        raise ValueError(
            f"{kind.__name__} has the fields {', '.join(sorted(names))}, not {', '.join(sorted(values))}"
        )
    return kind(**values)
