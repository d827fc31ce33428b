"""Quantization of keys and values to 8 bits: the search for the scale with the least error.

int8 has equal steps: a smaller scale makes them finer, and cuts off what is largest. The steps of fp8 (e4m3)
double with each power of two, so that only a scale's mantissa matters, as long as nothing is cut off: keys
have a few channels that are large and vary little, and those should lie on the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.models.kv_cache import QUANTIZED_MAX

_FACTORS = {
    torch.int8: torch.exp2(-torch.arange(9) / 8),
    torch.float8_e4m3fn: torch.exp2(torch.arange(9) / 8),
}
"""The scales that are tried: an octave in eight steps; 1 maps the largest magnitude to `QUANTIZED_MAX`."""


def candidate_scales(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales [candidates, heads] to try for heads with these largest magnitudes [heads], all float32."""
    fitting = torch.where(largest > 0, largest / QUANTIZED_MAX[dtype], 1.0)
    return _FACTORS[dtype].to(largest.device)[:, None] * fitting


def squared_errors(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The squared error [candidates, heads], summed over tokens and dim, of storing x [tokens, heads, dim]
    float32 with each of the scales [candidates, heads]."""
    return torch.stack([(fake_quantize(x, scale, dtype) - x).square().sum((0, 2)) for scale in scales])


def least_error(scales: Tensor, errors: Tensor) -> Tensor:
    """The scale of each head [heads], of scales [candidates, heads], whose error is least."""
    return scales.gather(0, errors.argmin(0, keepdim=True))[0]


def fake_quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [tokens, heads, dim] float32 as a cache of `dtype` with the scale [heads] gives it back."""
    stored = (x / scale[:, None]).clamp(-QUANTIZED_MAX[dtype], QUANTIZED_MAX[dtype])
    stored = stored.round() if dtype == torch.int8 else stored.to(dtype).float()
    return stored * scale[:, None]
