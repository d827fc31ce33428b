"""The public functions. Each checks nothing per call beyond what torch checks: callers pass the shapes named."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.formats import Dense

_library = torch.library.Library("fastserve", "DEF")


def _define(schema: str, implementation: Callable) -> None:
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")


_define("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor", reference.linear)
_define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", reference.rms_norm)
_define("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)", reference.add_rms_norm)
_define("swiglu(Tensor gate_up) -> Tensor", reference.swiglu)
_define("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", reference.rotary)
_define(
    "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()",
    reference.write_kv,
)
_define(
    "rotary_write_kv(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor slot_mapping) -> Tensor",
    reference.rotary_write_kv,
)
_define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor query_start, Tensor context_lens, "
    "Tensor block_tables, float scale, int? sliding_window, float? softcap) -> Tensor",
    reference.paged_attention,
)
_define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor uniform) -> Tensor",
    reference.sample,
)
_define(
    "log_probs(Tensor logits, Tensor token_ids, int k) -> (Tensor, Tensor, Tensor, Tensor)", reference.log_probs
)

_ops = torch.ops.fastserve


def _mkldnn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y if residual is None else y.add_(residual)


_library.impl("linear", _mkldnn_linear, "MkldnnCPU")


def linear(x: Tensor, weight: Dense, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [T, K] times the weight [N, K] transposed, plus bias [N] and residual [T, N]: [T, N]."""
    return _ops.linear(x, weight.weight, bias, residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as transformers' LlamaRMSNorm rounds it."""
    return _ops.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    return _ops.add_rms_norm(x, residual, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2 I], the first half gate: [T, I]."""
    return _ops.swiglu(gate_up)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv 2104.09864) of q [T, H, D] and k [T, Hk, D], halves rotated as in Llama.

    cos and sin are [T, R] with R <= D: the first R of the D dimensions are rotated, the others kept.
    """
    return _ops.rotary(q, k, cos, sin)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Puts k [T, Hk, D] and v [T, Hk, Dv] into the caches [blocks, block_size, Hk, D or Dv] at slots [T] int64."""
    _ops.write_kv(k, v, k_cache, v_cache, slot_mapping)


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
    """`rotary`, then `write_kv` of the rotated k: the rotated q."""
    return _ops.rotary_write_kv(q, k, v, cos, sin, k_cache, v_cache, slot_mapping)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of q [T, H, D] over each sequence's blocks: [T, H, Dv].

    With `sliding_window` = w a token sees itself and the w - 1 before it. With `softcap` = c scores become
    c * tanh(score / c). The caches must hold finite numbers everywhere: zero them once when they are made.
    """
    return _ops.paged_attention(
        q,
        k_cache,
        v_cache,
        meta.query_start,
        meta.context_lens,
        meta.block_tables,
        scale,
        sliding_window,
        softcap,
    )


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """Token ids [B] int64 for logits [B, V], each row by its own parameters and its own uniform number in [0, 1).

    Temperature 0 takes the likeliest. Else, in this order: divide by the temperature; keep the top_k likeliest
    (0 and below: all); of these the fewest whose probabilities sum to top_p or more; of these the ones
    at least min_p times as likely as the likeliest; then invert the cumulative distribution at `uniform`.
    """
    return _ops.sample(logits, temperature, top_k, top_p, min_p, uniform)


def log_probs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax of logits [B, V]: the chosen tokens' [B], their ranks from 1 [B], and the k likeliest ids and
    log-probabilities [B, k], best first."""
    return _ops.log_probs(logits, token_ids, k)
