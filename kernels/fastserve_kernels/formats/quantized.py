"""Formats of few bits per weight: integers, a codebook, and eight-bit floats.

`scales`, and `zeros` where there are any, have one entry for each group of G = group_size adjacent columns of
a row; G is 32, 64, 128, or K: one group per row. They are float32, float16 or bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastserve_kernels.formats.weight import (
    FLOATS,
    MatrixWeight,
    check_even,
    check_group_size,
    check_tensor,
    check_weight,
    name_of,
    pack_pairs,
    spread,
    unpack_pairs,
)

LARGEST_FP8 = 448.0
"""The largest number of float8_e4m3fn."""

NORMAL_FLOAT_4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, scaled to [-1, 1]: QLoRA's codebook (arXiv 2305.14314, appendix E)."""


@dataclass(frozen=True, eq=False)
class Int4(MatrixWeight):
    """w = (code - zero) * scale, with codes from 0 to 15."""

    codes: Tensor
    """[N, K / 2] uint8: two codes per byte, the even column in the low nibble. K is even."""
    scales: Tensor
    """[N, K / G]."""
    zeros: Tensor | None
    """[N, K / G] of the scales' dtype, not always whole numbers; None: 8 everywhere (symmetric)."""
    group_size: int

    operator: ClassVar[str] = "linear_int4"
    columns_per_element: ClassVar[int] = 2

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        group_size: int | None = 128,
        symmetric: bool = True,
        scale_dtype: torch.dtype | None = None,
    ) -> Int4:
        """Rounds a float weight [N, K] to the nearest codes.

        `group_size` None is one group per row. Symmetric: scale = max|w| / 7.5. Else scale = (max - min) / 15
        of the group and 0, and a whole zero from 0 to 15. `scale_dtype` None is that of the weight.

        Raises ValueError if the weight is no finite float matrix, K is odd or no multiple of the group size,
        or `scale_dtype` cannot hold a scale.
        """
        weight = check_weight(weight)
        check_even(weight.shape[1], 2)
        group_size = _group_size(group_size, weight)
        codes, scales, zeros = round_to_integers(weight, group_size, 4, symmetric, scale_dtype)
        return cls(pack_pairs(codes), scales, zeros, group_size)

    def _check(self) -> None:
        n, half = check_tensor("Int4.codes", self.codes, ("N", "K / 2"), (torch.uint8,))
        _check_groups("Int4", n, 2 * half, self.group_size, self.scales, self.zeros)

    def dequantize(self) -> Tensor:
        """(code - zero) * scale: [N, K] float32."""
        zeros = 8.0 if self.zeros is None else spread(self.zeros, self.group_size)
        return (unpack_pairs(self.codes).float() - zeros) * spread(self.scales, self.group_size)


@dataclass(frozen=True, eq=False)
class Int8(MatrixWeight):
    """w = (value - zero) * scale, with values from -128 to 127."""

    values: Tensor
    """[N, K] int8."""
    scales: Tensor
    """[N, K / G]."""
    zeros: Tensor | None
    """[N, K / G] of the scales' dtype; None: 0 everywhere (symmetric)."""
    group_size: int

    operator: ClassVar[str] = "linear_int8"

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        group_size: int | None = None,
        symmetric: bool = True,
        scale_dtype: torch.dtype | None = None,
    ) -> Int8:
        """Rounds a float weight [N, K] to the nearest values.

        `group_size` None is one group per row. Symmetric: scale = max|w| / 127.5. Else scale = (max - min) /
        255 of the group and 0, and a whole zero from -128 to 127. `scale_dtype` None is that of the weight.

        Raises ValueError if the weight is no finite float matrix, K is no multiple of the group size, or
        `scale_dtype` cannot hold a scale.
        """
        weight = check_weight(weight)
        group_size = _group_size(group_size, weight)
        codes, scales, zeros = round_to_integers(weight, group_size, 8, symmetric, scale_dtype)
        return cls((codes - 128).to(torch.int8), scales, None if zeros is None else zeros - 128, group_size)

    def _check(self) -> None:
        n, k = check_tensor("Int8.values", self.values, ("N", "K"), (torch.int8,))
        _check_groups("Int8", n, k, self.group_size, self.scales, self.zeros)

    def dequantize(self) -> Tensor:
        """(value - zero) * scale: [N, K] float32."""
        zeros = 0.0 if self.zeros is None else spread(self.zeros, self.group_size)
        return (self.values.float() - zeros) * spread(self.scales, self.group_size)


@dataclass(frozen=True, eq=False)
class NF4(MatrixWeight):
    """w = codebook[code] * scale."""

    codes: Tensor
    """[N, K / 2] uint8: two codes per byte, the even column in the low nibble. K is even."""
    scales: Tensor
    """[N, K / G]."""
    codebook: Tensor
    """[16] float32, in any order."""
    group_size: int

    operator: ClassVar[str] = "linear_nf4"
    columns_per_element: ClassVar[int] = 2

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        group_size: int | None = 64,
        codebook: Tensor | None = None,
        scale_dtype: torch.dtype | None = None,
    ) -> NF4:
        """Takes the nearest entry for each element of a float weight [N, K]; scale = max|w| / max|entry|.

        `group_size` None is one group per row, `codebook` None is `NORMAL_FLOAT_4`, `scale_dtype` None is
        that of the weight. Raises ValueError as `Int4.pack` does, and if the codebook is no [16] float32.
        """
        weight = check_weight(weight)
        check_even(weight.shape[1], 2)
        group_size = _group_size(group_size, weight)
        if codebook is None:
            codebook = torch.tensor(NORMAL_FLOAT_4, device=weight.device)
        check_tensor("codebook", codebook, (16,), (torch.float32,))
        largest = weight.float().unflatten(1, (-1, group_size)).abs().amax(-1)
        scales = representable(largest / codebook.abs().max(), scale_dtype or weight.dtype)
        ordered, order = codebook.sort()
        between = (ordered[:-1] + ordered[1:]) / 2
        nearest = torch.bucketize(weight.float() / spread(scales, group_size), between)
        return cls(pack_pairs(order[nearest]), scales, codebook, group_size)

    def _check(self) -> None:
        n, half = check_tensor("NF4.codes", self.codes, ("N", "K / 2"), (torch.uint8,))
        check_tensor("NF4.codebook", self.codebook, (16,), (torch.float32,))
        _check_groups("NF4", n, 2 * half, self.group_size, self.scales)

    def dequantize(self) -> Tensor:
        """codebook[code] * scale: [N, K] float32."""
        return self.codebook[unpack_pairs(self.codes).int()] * spread(self.scales, self.group_size)


@dataclass(frozen=True, eq=False)
class FP8(MatrixWeight):
    """w = value * scale."""

    values: Tensor
    """[N, K] float8_e4m3fn."""
    scales: Tensor
    """[N, K / G]."""
    group_size: int

    operator: ClassVar[str] = "linear_fp8"

    @classmethod
    def pack(
        cls, weight: Tensor, group_size: int | None = None, scale_dtype: torch.dtype | None = None
    ) -> FP8:
        """Rounds a float weight [N, K] to the nearest values, with scale = max|w| / 448.

        `group_size` None is one group per row, `scale_dtype` None is the dtype of the weight. Raises
        ValueError if the weight is no finite float matrix, K is no multiple of the group size, or
        `scale_dtype` cannot hold a scale.
        """
        weight = check_weight(weight)
        group_size = _group_size(group_size, weight)
        largest = weight.float().unflatten(1, (-1, group_size)).abs().amax(-1)
        scales = representable(largest / LARGEST_FP8, scale_dtype or weight.dtype)
        scaled = (weight.float() / spread(scales, group_size)).clamp(-LARGEST_FP8, LARGEST_FP8)
        return cls(scaled.to(torch.float8_e4m3fn), scales, group_size)

    def _check(self) -> None:
        n, k = check_tensor("FP8.values", self.values, ("N", "K"), (torch.float8_e4m3fn,))
        _check_groups("FP8", n, k, self.group_size, self.scales)

    def dequantize(self) -> Tensor:
        """value * scale: [N, K] float32."""
        return self.values.float() * spread(self.scales, self.group_size)


@dataclass(frozen=True, eq=False)
class W8A8(MatrixWeight):
    """w = value * scale of its row, multiplied in integers with activations that are rounded too.

    For each row of x: sx = max|x| / 127, xq = x / sx rounded half to even, y = (xq . value) * sx * scale.
    """

    values: Tensor
    """[N, K] int8."""
    scales: Tensor
    """[N] float32."""

    operator: ClassVar[str] = "linear_w8a8"

    @classmethod
    def pack(cls, weight: Tensor) -> W8A8:
        """Rounds a float weight [N, K] to the nearest values, with scale = max|w| / 127.5 of each row.

        Raises ValueError if the weight is no finite float matrix.
        """
        weight = check_weight(weight)
        codes, scales, _ = round_to_integers(weight, weight.shape[1], 8, True, torch.float32)
        return cls((codes - 128).to(torch.int8), scales[:, 0])

    def _check(self) -> None:
        n, _ = check_tensor("W8A8.values", self.values, ("N", "K"), (torch.int8,))
        check_tensor("W8A8.scales", self.scales, (n,), (torch.float32,))

    def dequantize(self) -> Tensor:
        """value * scale: [N, K] float32."""
        return self.values.float() * self.scales[:, None]


def _group_size(group_size: int | None, weight: Tensor) -> int:
    size = weight.shape[1] if group_size is None else group_size
    check_group_size(size, weight.shape[1])
    return size


def _check_groups(
    name: str, rows: int, columns: int, group_size: int, scales: Tensor, zeros: Tensor | None = None
) -> None:
    check_group_size(group_size, columns)
    check_tensor(f"{name}.scales", scales, (rows, columns // group_size), FLOATS)
    if zeros is not None:
        check_tensor(f"{name}.zeros", zeros, (rows, columns // group_size), (scales.dtype,))


def round_to_integers(
    weight: Tensor, group_size: int, bits: int, symmetric: bool, scale_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [N, K] float32 from 0 to 2^bits - 1, scales and zeros; None: the zero is 2^(bits - 1)."""
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales, zeros = scales_and_zeros(low, high, bits, symmetric, scale_dtype or weight.dtype)
    offsets = 2.0 ** (bits - 1) if zeros is None else zeros.float()[..., None]
    codes = (groups / scales.float()[..., None]).round() + offsets
    return codes.clamp(0, 2**bits - 1).flatten(1), scales, zeros


def scales_and_zeros(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales and whole zero points of one shape, for codes from 0 to 2^bits - 1 of ranges that include 0.

    Symmetric: scale = 2 max(-low, high) / (2^bits - 1), and None: the zero point is 2^(bits - 1). Else scale
    = (high - low) / (2^bits - 1), zero = round(-low / scale). Raises ValueError if the dtype cannot hold a
    scale.
    """
    largest = 2**bits - 1
    if symmetric:
        return representable(2 * torch.maximum(-low, high) / largest, dtype), None
    scales = representable((high - low) / largest, dtype)
    return scales, (-low / scales.float()).round().clamp(0, largest).to(dtype)


def representable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales in this dtype, none so small that it loses precision, let alone that it is 0."""
    if dtype not in FLOATS:
        raise ValueError(f"scale_dtype must be float32, float16 or bfloat16, not {name_of(dtype)}")
    if (largest := float(scales.max())) > torch.finfo(dtype).max:
        raise ValueError(f"scale_dtype {name_of(dtype)} cannot hold a scale of {largest:.3g}")
    return scales.clamp(min=torch.finfo(dtype).tiny).to(dtype)
