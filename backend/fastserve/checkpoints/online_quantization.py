"""Online quantization (`--quantization`): weights are rounded to the nearest code as they are loaded, with no
calibration."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastserve.checkpoints.model_error import ModelError
from fastserve_kernels.formats import FP8, NF4, W8A8, Dense, Int4, Int8, Weight

GROUP_SIZES = (64, 32)
"""Columns that share a scale: the first size that divides a row is taken."""


def quantize(name: str, weight: Tensor, quantization: str) -> Weight:
    """A float weight [N, K] in the format of `--quantization`, other than "auto".

    `name` is for errors. Raises ModelError if a row does not divide into groups.
    """
    return _METHODS[quantization](name, weight)


def quantize_head(name: str, weight: Tensor, quantization: str) -> Weight:
    """The head [vocab, hidden] in int8 unless "none": a rounding error here is a wrong token."""
    return quantize(name, weight, "none" if quantization == "none" else "int8")


def _group_size(weight: Tensor) -> int | None:
    """The first of `GROUP_SIZES` that divides a row; None if none does."""
    return next((size for size in GROUP_SIZES if weight.shape[1] % size == 0), None)


def _group_size_of_4_bits(name: str, weight: Tensor) -> int:
    """The group size of a format of 4 bits, for which one scale for a whole row is too coarse."""
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
ACTIVATION_QUANTIZATIONS = ("auto", "none", "int8")
"""What `--activation-quantization` may be; "auto" is what is faster."""
