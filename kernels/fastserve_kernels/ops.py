"""The public functions. They check no more than torch does: callers pass the shapes and dtypes named here.

Each is an operator of torch.ops.fastserve: one implementation for a CPU, one for a GPU of NVIDIA, and
`reference` for any other device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.implementations import (
    CPU_MODULES,
    GPU_MODULES,
    cpu_module,
    gpu_module,
    imported_at_first_call,
)

_library = torch.library.Library("fastserve", "DEF")


def _define(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines an operator with all its implementations.

    Gives the one overload that it has: to find it at each call would cost 0.3 us.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    torch.library.register_fake(f"fastserve::{name}", fake, lib=_library)
    _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    if name in CPU_MODULES:
        _library.impl(name, imported_at_first_call(name, cpu_module), "CPU")
    if name in GPU_MODULES:
        _library.impl(name, imported_at_first_call(name, gpu_module), "CUDA")
    overload: Callable[..., Any] = getattr(torch.ops.fastserve, name).default
    return overload


_WEIGHTS = {
    "linear": "Tensor weight",
    "linear_int4": "Tensor codes, Tensor scales, Tensor? zeros, int out_features, int group_size",
    "linear_int8": "Tensor values, Tensor scales, Tensor? zeros, int out_features, int group_size",
    "linear_int_rows": "Tensor? narrow, Tensor? narrow_scales, Tensor? narrow_zeros, Tensor? wide, "
    "Tensor? wide_scales, Tensor? wide_zeros, Tensor rows, int out_features, int narrow_rows, int group_size",
    "linear_nf4": "Tensor codes, Tensor scales, Tensor codebook, int out_features, int group_size",
    "linear_fp8": "Tensor values, Tensor scales, int out_features, int group_size",
    "linear_w8a8": "Tensor values, Tensor scales, int out_features",
    "linear_sparse24": "Tensor values, Tensor indices, int out_features",
    "linear_sparse24_int4": "Tensor codes, Tensor indices, Tensor scales, int out_features, int group_size",
    "linear_block_sparse": "Tensor blocks, Tensor row_starts, Tensor columns, int out_features",
    "linear_bitmap": "Tensor values, Tensor mask, Tensor row_starts, int out_features",
    "linear_low_rank": "Tensor down, Tensor up",
}
"""What the operator of each format takes between x and bias."""


def _fake_linear(x: Tensor, *arguments: Any) -> Tensor:
    """The number of outputs is an argument, or else that of the rows of the last tensor of the weight."""
    *weight, _, _ = arguments
    out_features = next((a for a in weight if not isinstance(a, Tensor | None)), None)
    return x.new_empty(x.shape[0], weight[-1].shape[0] if out_features is None else out_features)


LINEARS = {
    name: _define(f"{name}(Tensor x, {weight}, Tensor? bias, Tensor? residual) -> Tensor", _fake_linear)
    for name, weight in _WEIGHTS.items()
}
"""What multiplies by a weight, by the operator that its format names; `registration` adds to it."""
# Where a CPU's dense weight lies in oneDNN's blocks, torch's dispatcher takes this key before the CPU's.
_library.impl("linear", imported_at_first_call("linear", cpu_module), "MkldnnCPU")

_rms_norm = _define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    lambda x, weight, eps: x.new_empty(x.shape),
)
_add_rms_norm = _define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
_swiglu = _define(
    "swiglu(Tensor gate_up) -> Tensor",
    lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
)
_rotary = _define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    lambda q, k, cos, sin: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
_write_kv = _define(
    "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
    "Tensor? k_scale, Tensor? v_scale) -> ()",
    lambda *_: None,
)
_rotary_write_kv = _define(
    "rotary_write_kv(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale) -> Tensor",
    lambda q, *_: q.new_empty(q.shape),
)
_paged_attention = _define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor query_start, Tensor context_lens, "
    "Tensor block_tables, float scale, int? sliding_window, float? softcap, Tensor? k_scale, "
    "Tensor? v_scale) -> Tensor",
    lambda q, k_cache, v_cache, *_: q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3]),
)
_sample = _define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor uniform) "
    "-> Tensor",
    lambda logits, *_: logits.new_empty(len(logits), dtype=torch.int64),
)
_log_probs = _define(
    "log_probs(Tensor logits, Tensor token_ids, int k) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda logits, token_ids, k: (
        logits.new_empty(len(logits), dtype=torch.float32),
        logits.new_empty(len(logits), dtype=torch.int64),
        logits.new_empty(len(logits), k, dtype=torch.int64),
        logits.new_empty(len(logits), k, dtype=torch.float32),
    ),
)


def linear(x: Tensor, weight: Prepared, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [T, K] times the weight [N, K] transposed, plus bias [N] and residual [T, N]: [T, N].

    All of one dtype: float32, float16 or bfloat16, that for which the weight was prepared. Sums are float32,
    bias and residual included, and rounded once. x may be strided, and T may be 0.

    Raises ValueError if x is no matrix of K columns: a kernel would read beyond its end.
    """
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"x must have shape [T, {weight.in_features}], not {list(x.shape)}")
    return LINEARS[weight.operator](x, *weight.arguments, bias, residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as transformers' LlamaRMSNorm rounds it.

    x is [T, D], or [T, H, D] for a norm of each head.
    """
    return _rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    return _add_rms_norm(x, residual, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2 I], the first half gate: [T, I]."""
    return _swiglu(gate_up)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv 2104.09864) of q [T, H, D] and k [T, Hk, D], by halves as in Llama.

    cos and sin are [T, R] with R <= D: the first R of the D dimensions are rotated, the others kept.
    """
    return _rotary(q, k, cos, sin)


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Puts k [T, Hk, D] and v [T, Hk, Dv] into caches [blocks, block_size, Hk, D or Dv] at slots [T] int64.

    Caches are of the dtype of k and v, and the scales None; or int8 or float8_e4m3fn, and k_scale and v_scale
    [Hk] float32: then k / k_scale is stored, rounded half to even, and at most 127 or 448 in magnitude.

    Numbers that are not finite are written as 0: a block goes from one request to the next, and what the
    next one has not yet overwritten is multiplied by probabilities of zero.
    """
    _write_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def rotary_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`rotary`, then `write_kv` of the rotated k: the rotated q.

    Raises ValueError on a CPU if a cache is not contiguous, or of a dtype that `write_kv` does not name.
    """
    return _rotary_write_kv(q, k, v, cos, sin, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [T, H, D] over the blocks of each token's sequence: [T, H, Dv].

    k_cache and v_cache are [blocks, block_size, Hk, D and Dv]; Hk divides H. With `sliding_window` = w a
    token sees itself and the w - 1 before it. With `softcap` = c scores become c * tanh(score / c). Caches of
    int8 or float8_e4m3fn hold keys divided by k_scale and values divided by v_scale, [Hk] float32 each.

    The caches must be finite everywhere, also where nothing was written: make them of zeros; `write_kv` keeps
    them finite. Raises ValueError on a CPU if a cache is not contiguous, or of a dtype that `write_kv` does
    not name.
    """
    return _paged_attention(
        q,
        k_cache,
        v_cache,
        meta.query_start,
        meta.context_lens,
        meta.block_tables,
        scale,
        sliding_window,
        softcap,
        k_scale,
        v_scale,
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
    Temperatures below 1e-5 count as 1e-5. Tokens of logit -inf are never chosen. A row that holds NaN or
    infinity, or -inf alone, has no distribution: its token is one of 0 .. V - 1, but which is not defined.
    """
    return _sample(logits, temperature, top_k, top_p, min_p, uniform)


def log_probs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax of logits [B, V] in float32.

    Returns those of token_ids [B], their ranks from 1 [B] int64, and the k likeliest tokens' ids [B, k] int64
    and log-probabilities [B, k], best first, equal ones by id. A rank counts the tokens that are likelier.
    """
    return _log_probs(logits, token_ids, k)
