"""Which scale rounds keys or values to 8 bits with the least error.

int8 has equal steps: a smaller scale makes them finer and cuts off more. fp8 (e4m3) has steps that double with
each power of two, so that a scale's mantissa decides which numbers are hit well: keys have a few channels that
are large and vary little, and those should lie on the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.models.kv_cache import LARGEST

_STEPS_PER_OCTAVE = 16


def candidate_scales(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales [candidates, heads] float32 for heads whose largest magnitudes are `largest` [heads].

    They reach from one that cuts off at half of the largest to one that leaves room for twice it.
    """
    exponents = torch.arange(-_STEPS_PER_OCTAVE, _STEPS_PER_OCTAVE + 1, device=largest.device)
    factors = torch.exp2(exponents / _STEPS_PER_OCTAVE)
    fitting = torch.where(largest > 0, largest / LARGEST[dtype], 1.0)
    return factors[:, None] * fitting


def squared_errors(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What it costs to store x [tokens, heads, dim] float32 with each of the scales: sums [candidates, heads]."""
    return torch.stack([(rounded(x, scale, dtype) - x).square().sum((0, 2)) for scale in scales])


def least_error(scales: Tensor, errors: Tensor) -> Tensor:
    """Of each head the scale [heads] whose error is least."""
    return scales.gather(0, errors.argmin(0, keepdim=True))[0]


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [tokens, heads, dim] float32 as a cache of that dtype gives it back; the scale is [heads]."""
    stored = (x / scale[:, None]).clamp(-LARGEST[dtype], LARGEST[dtype])
    stored = stored.round() if dtype == torch.int8 else stored.to(dtype).float()
    return stored * scale[:, None]
