"""The operators on a CPU, for few tokens: as few calls into torch as each can be made of."""

from __future__ import annotations

import torch
from torch import Tensor

WIDEST_SINGLE_ROW = 1024
"""oneDNN adds up a wider single row in another order than several rows; rounding to bfloat16 hides most of it."""


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [T, K] by a weight in oneDNN's blocked layout. The residual is added after rounding, as transformers
    does; fused into the product it takes as long."""
    rows = len(x)
    if rows == 1 and x.shape[1] > WIDEST_SINGLE_ROW:
        x = x.expand(2, -1)
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")[:rows]
    return y if residual is None else y.add_(residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.rms_norm(x, (x.shape[-1],), None, eps).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def _rotate_together(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys [T, H + Hk, D] in one tensor, rotated."""
    both = torch.cat((q, k), dim=1)
    rotary_dim = cos.shape[-1]
    turned = both if rotary_dim == both.shape[-1] else both[..., :rotary_dim]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    rotated = (turned * cos.unsqueeze(1)).addcmul_(swapped, sin.unsqueeze(1))
    if turned is both:
        return rotated
    turned.copy_(rotated)
    return both


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    both = _rotate_together(q, k, cos, sin)
    # Operators must not return two views of one tensor.
    return both[:, : q.shape[1]].contiguous(), both[:, q.shape[1] :].contiguous()


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    for new, cache in ((k, k_cache), (v, v_cache)):
        finite = torch.nan_to_num(new, 0.0, 0.0, 0.0)
        cache.flatten(0, 1).index_copy_(0, slot_mapping, finite.to(cache.dtype))


def rotary_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    both = _rotate_together(q, k, cos, sin)
    heads = q.shape[1]
    write_kv(both[:, heads:], v, k_cache, v_cache, slot_mapping)
    return both[:, :heads].contiguous()
