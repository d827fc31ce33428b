"""Rounding a weight to few bits as it is loaded: to the nearest code, with no calibration."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastserve.checkpoints.model_error import ModelError
from fastserve_kernels.formats import FP8, NF4, W8A8, Dense, Int4, Int8, Weight

GROUP_SIZES = (64, 32)
"""Columns that share a scale: the first that divides a row."""


def quantize(name: str, weight: Tensor, quantization: str) -> Weight:
    """A weight [N, K] in the format of `--quantization`. Raises ModelError if rows have no whole groups."""
    return _METHODS[quantization](name, weight)


def quantize_head(name: str, weight: Tensor, quantization: str) -> Weight:
    """The head, in 8 bits where the layers have fewer: a wrong step here is a wrong token."""
    return quantize(name, weight, "none" if quantization == "none" else "int8")


def _group_size(weight: Tensor) -> int | None:
    """None if no size divides a row."""
    return next((size for size in GROUP_SIZES if weight.shape[1] % size == 0), None)


def _group_size_of_4_bits(name: str, weight: Tensor) -> int:
    """A whole row is too much to share a scale of 4 bits."""
    size = _group_size(weight)
    if size is None:
        raise ModelError(
            f"{name}: rows of {weight.shape[1]} cannot be quantized to 4 bits; allowed: multiples of 32"
        )
    return size


_METHODS: dict[str, Callable[[str, Tensor], Weight]] = {
    "none": lambda name, weight: Dense(weight),
    "int4": lambda name, weight: Int4.pack(weight, _group_size_of_4_bits(name, weight), symmetric=False),
    "nf4": lambda name, weight: NF4.pack(weight, _group_size_of_4_bits(name, weight)),
    "int8": lambda name, weight: Int8.pack(weight, _group_size(weight)),
    "fp8": lambda name, weight: FP8.pack(weight),
    "w8a8": lambda name, weight: W8A8.pack(weight),
}

QUANTIZATIONS = ("auto", *_METHODS)
"""What `--quantization` may be; "auto" is the checkpoint's own."""
