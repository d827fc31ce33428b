"""The public functions. They check no more than torch does: callers pass the shapes and dtypes named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels import cpu, cpu_sampling, reference
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.formats import Dense

_library = torch.library.Library("fastserve", "DEF")
_ops = torch.ops.fastserve


def _define(schema: str, fake: Callable[..., Any], on_cpu: Callable[..., Any] | None) -> None:
    """Defines an operator: `reference` has its implementation for every device, `on_cpu` is the CPU's own."""
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastserve::{name}", fake, lib=_library)
    if on_cpu is not None:
        _library.impl(name, on_cpu, "CPU")


_define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor",
    lambda x, weight, bias, residual: x.new_empty(x.shape[0], weight.shape[0]),
    None,
)
_library.impl("linear", cpu.packed_linear, "MkldnnCPU")
_define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    lambda x, weight, eps: x.new_empty(x.shape),
    cpu.rms_norm,
)
_define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    cpu.add_rms_norm,
)
_define(
    "swiglu(Tensor gate_up) -> Tensor",
    lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
    cpu.swiglu,
)
_define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    lambda q, k, cos, sin: (q.new_empty(q.shape), k.new_empty(k.shape)),
    None,
)
_define(
    "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()",
    lambda k, v, k_cache, v_cache, slot_mapping: None,
    cpu.write_kv,
)
_define(
    "rotary_write_kv(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor slot_mapping) -> Tensor",
    lambda q, k, v, cos, sin, k_cache, v_cache, slot_mapping: q.new_empty(q.shape),
    cpu.rotary_write_kv,
)
_define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor query_start, Tensor context_lens, "
    "Tensor block_tables, float scale, int? sliding_window, float? softcap) -> Tensor",
    lambda q, k_cache, v_cache, *_: q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3]),
    cpu.paged_attention,
)
_define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor uniform) "
    "-> Tensor",
    lambda logits, *_: logits.new_empty(len(logits), dtype=torch.int64),
    cpu_sampling.sample,
)
_define(
    "log_probs(Tensor logits, Tensor token_ids, int k) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda logits, token_ids, k: (
        logits.new_empty(len(logits), dtype=torch.float32),
        logits.new_empty(len(logits), dtype=torch.int64),
        logits.new_empty(len(logits), k, dtype=torch.int64),
        logits.new_empty(len(logits), k, dtype=torch.float32),
    ),
    cpu_sampling.log_probs,
)


def linear(x: Tensor, weight: Dense, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [T, K] times the weight [N, K] transposed, plus bias [N] and residual [T, N]: [T, N]."""
    return _ops.linear(x, weight.weight, bias, residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as transformers' LlamaRMSNorm rounds it.

    x is [T, D], or [T, H, D] for a norm of each head.
    """
    return _ops.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    return _ops.add_rms_norm(x, residual, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2 I], the first half gate: [T, I]."""
    return _ops.swiglu(gate_up)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv 2104.09864) of q [T, H, D] and k [T, Hk, D], by halves as in Llama.

    cos and sin are [T, R] with R <= D: the first R of the D dimensions are rotated, the others kept.
    """
    return _ops.rotary(q, k, cos, sin)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Puts k [T, Hk, D] and v [T, Hk, Dv] into caches [blocks, block_size, Hk, D or Dv] at slots [T] int64.

    Numbers that are not finite are written as 0: a block goes from one request to the next, and what the
    next one has not yet overwritten is multiplied by probabilities of zero.
    """
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
    """`rotary`, then `write_kv` of the rotated k: the rotated q.

    Raises ValueError on a CPU if a cache is not contiguous or of another dtype than q.
    """
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
    """Causal attention of q [T, H, D] over the blocks of each token's sequence: [T, H, Dv].

    k_cache and v_cache are [blocks, block_size, Hk, D and Dv]; Hk divides H. With `sliding_window` = w a
    token sees itself and the w - 1 before it. With `softcap` = c scores become c * tanh(score / c).

    The caches must be finite everywhere, also where nothing was written: make them of zeros; `write_kv` keeps
    them finite. Raises ValueError on a CPU if a cache is not contiguous or of another dtype than q.
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
    """Token ids [B] int64 for logits [B, V], each row by its own parameters.

    Temperature 0 takes the likeliest. Else, in this order: divide by the temperature; keep the top_k
    likeliest (0 and below: all); of these the fewest whose probabilities sum to top_p or more; of these the
    ones at least min_p times as likely as the likeliest; then invert the cumulative distribution at
    `uniform`. In it the tokens come by probability, equal ones by id; where nothing is filtered, all by id.

    temperature, top_p and min_p are [B] float32, top_k is [B] int32 or int64, uniform [B] float64 in [0, 1).
    Temperatures below 1e-5 count as 1e-5. Tokens of logit -inf are never chosen.
    """
    return _ops.sample(logits, temperature, top_k, top_p, min_p, uniform)


def log_probs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax of logits [B, V] in float32.

    Returns those of token_ids [B], their ranks from 1 [B] int64, and the k likeliest tokens' ids [B, k] int64
    and log-probabilities [B, k], best first, equal ones by id. A rank counts the tokens that are likelier.
    """
    return _ops.log_probs(logits, token_ids, k)
