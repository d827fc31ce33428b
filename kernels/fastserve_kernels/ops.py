"""The public functions. They check no more than torch does: callers pass the shapes and dtypes named here.

Each is an operator of torch.ops.fastserve. `define` registers all of its implementations, which have one
signature: that of `cpu`; that of `gpu.registry` on a GPU of NVIDIA; the function of `reference` on any other
device, and where there is none of these.

torch.library knows tensors and numbers, and no tuples of them. So a weight, a cache and a batch go to the
operator field by field, and the functions `_of_...` put them together again for an implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.cpu import encoder_attention, linears, operators, sampling
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.kv_cache import KVCache
from fastserve_kernels.operator_definition import Function, define, library


def _of_weight(linear: Function) -> Function:
    """The arguments of the weight come between x and bias."""

    def call(x: Tensor, *arguments: Any) -> Tensor:
        result: Tensor = linear(x, arguments[:-2], arguments[-2], arguments[-1])
        return result

    return call


_kv_cache: Callable[[tuple[Tensor, Tensor, Tensor | None, Tensor | None]], KVCache] = functools.partial(
    tuple.__new__, KVCache
)
"""What `KVCache` does of its fields, at half the cost, 0.1 us: this is for each call of an operator."""


def _of_cache(implementation: Function) -> Function:
    """`write_kv`."""

    def call(
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> None:
        implementation(k, v, _kv_cache((k_cache, v_cache, k_scale, v_scale)), slot_mapping)

    return call


def _of_rotation_and_cache(implementation: Function) -> Function:
    """`rotary_write_kv`."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> Tensor:
        cache = _kv_cache((k_cache, v_cache, k_scale, v_scale))
        rotated: Tensor = implementation(q, k, v, cos, sin, cache, slot_mapping)
        return rotated

    return call


def _of_cache_and_batch(implementation: Function) -> Function:
    """`paged_attention`."""

    def call(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> Tensor:
        cache = _kv_cache((k_cache, v_cache, k_scale, v_scale))
        batch = (query_start, context_lens, block_tables)
        attended: Tensor = implementation(q, cache, batch, scale, sliding_window, softcap)
        return attended

    return call


def _fake_linear(x: Tensor, *arguments: Any) -> Tensor:
    """The number of outputs is an argument, or else that of the rows of the last tensor of the weight."""
    *weight, _, _ = arguments
    out_features = next((a for a in weight if not isinstance(a, Tensor | None)), None)
    return x.new_empty(x.shape[0], weight[-1].shape[0] if out_features is None else out_features)


def _define_linear(function: Function, weight: str, cpu: Function | None) -> Function:
    """`weight`: its arguments, as a schema has them (`formats.prepared`). torch's own product is what a GPU
    has for a dense one."""
    schema = f"(Tensor x, {weight}, Tensor? bias, Tensor? residual) -> Tensor"
    gpu = function not in (reference.linear, reference.linear_int4_a8, reference.linear_int8_a8)
    return define(function, _fake_linear, cpu, gpu, flat=_of_weight, schema=schema)


_INTEGERS = "Tensor codes, Tensor scales, Tensor? zeros, int out_features, int group_size"
_WEIGHTS: Mapping[Function, tuple[str, Function | None]] = {
    reference.linear: ("Tensor weight", linears.linear),
    reference.linear_int4: (_INTEGERS, linears.linear_int4),
    reference.linear_int8: (_INTEGERS, linears.linear_int8),
    reference.linear_int4_a8: (_INTEGERS, linears.linear_int4_a8),
    reference.linear_int8_a8: (_INTEGERS, linears.linear_int8_a8),
    reference.linear_int_rows: (
        "Tensor? narrow, Tensor? narrow_scales, Tensor? narrow_zeros, Tensor? wide, Tensor? wide_scales, "
        "Tensor? wide_zeros, Tensor rows, int out_features, int narrow_rows, int group_size",
        linears.linear_int_rows,
    ),
    reference.linear_nf4: (
        "Tensor codes, Tensor scales, Tensor codebook, int out_features, int group_size",
        linears.linear_nf4,
    ),
    reference.linear_fp8: (
        "Tensor values, Tensor scales, int out_features, int group_size",
        linears.linear_fp8,
    ),
    reference.linear_w8a8: ("Tensor values, Tensor scales, int out_features", linears.linear_w8a8),
    reference.linear_sparse24: ("Tensor values, Tensor indices, int out_features", None),
    reference.linear_sparse24_int4: (
        "Tensor codes, Tensor indices, Tensor scales, int out_features, int group_size",
        None,
    ),
    reference.linear_block_sparse: (
        "Tensor blocks, Tensor row_starts, Tensor columns, int out_features",
        linears.linear_block_sparse,
    ),
    reference.linear_bitmap: ("Tensor values, Tensor mask, Tensor row_starts, int out_features", None),
    reference.linear_low_rank: ("Tensor down, Tensor up", linears.linear_low_rank),
}
"""The arguments of each one's weight, and the CPU's implementation; None for what `prepare` makes another
format's weight on a CPU."""

LINEARS: dict[str, Function] = {
    function.__name__: _define_linear(function, *given) for function, given in _WEIGHTS.items()
}
"""What multiplies by a weight, by the operator that its format names; `registration` adds to it."""
# Where a CPU's dense weight lies in oneDNN's blocks, torch's dispatcher takes this key before the CPU's.
library.impl("linear", _of_weight(linears.linear), "MkldnnCPU")

_rms_norm = define(
    reference.rms_norm,
    lambda x, weight, eps: x.new_empty(x.shape),
    operators.rms_norm,
)
_add_rms_norm = define(
    reference.add_rms_norm,
    lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    operators.add_rms_norm,
)
_swiglu = define(
    reference.swiglu,
    lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
    operators.swiglu,
)
_rotary = define(
    reference.rotary,
    lambda q, k, cos, sin: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
_write_kv = define(
    reference.write_kv,
    lambda *_: None,
    operators.write_kv,
    mutates=("k_cache", "v_cache"),
    flat=_of_cache,
)
_rotary_write_kv = define(
    reference.rotary_write_kv,
    lambda q, *_: q.new_empty(q.shape),
    operators.rotary_write_kv,
    mutates=("k_cache", "v_cache"),
    flat=_of_rotation_and_cache,
)
_paged_attention = define(
    reference.paged_attention,
    lambda q, k_cache, v_cache, *_: q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3]),
    operators.paged_attention,
    flat=_of_cache_and_batch,
)
_varlen_attention = define(
    reference.varlen_attention,
    lambda q, k, v, *_: q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
    encoder_attention.varlen_attention,
)
_sample = define(
    reference.sample,
    lambda logits, *_: logits.new_empty(len(logits), dtype=torch.int64),
    sampling.sample,
)
_log_probs = define(
    reference.log_probs,
    lambda logits, token_ids, k: (
        logits.new_empty(len(logits), dtype=torch.float32),
        logits.new_empty(len(logits), dtype=torch.int64),
        logits.new_empty(len(logits), k, dtype=torch.int64),
        logits.new_empty(len(logits), k, dtype=torch.float32),
    ),
    sampling.log_probs,
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


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """Puts k [T, Hk, D] and v [T, Hk, Dv] into a cache at slots [T] int64.

    The cache is of the dtype of k and v, and its scales None; or int8 or float8_e4m3fn, and it has scales:
    then k / k_scale is stored, rounded half to even, and at most 127 or 448 in magnitude.

    Numbers that are not finite are written as 0: a block goes from one request to the next, and what the
    next one has not yet overwritten is multiplied by probabilities of zero.
    """
    k_cache, v_cache, k_scale, v_scale = cache
    _write_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def rotary_write_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, slot_mapping: Tensor
) -> Tensor:
    """`rotary`, then `write_kv` of the rotated k: the rotated q.

    Raises ValueError on a CPU if a cache is not contiguous, or of a dtype that `write_kv` does not name.
    """
    k_cache, v_cache, k_scale, v_scale = cache
    return _rotary_write_kv(q, k, v, cos, sin, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def paged_attention(
    q: Tensor,
    cache: KVCache,
    meta: AttentionMetadata,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of q [T, H, D] over the blocks of each token's sequence: [T, H, Dv].

    The cache's heads Hk divide H. With `sliding_window` = w a token sees itself and the w - 1 before it. With
    `softcap` = c scores become c * tanh(score / c).

    The cache must be finite everywhere, also where nothing was written: make it of zeros; `write_kv` keeps it
    finite. Raises ValueError on a CPU if it is not contiguous, or of a dtype that `write_kv` does not name.
    """
    k_cache, v_cache, k_scale, v_scale = cache
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


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of each token to all of its sequence, before and after it: an encoder's. [T, H, Dv].

    A ragged batch: q [T, H, D], k [T, H, D] and v [T, H, Dv] of one dtype hold the tokens of B sequences, one
    sequence after the other; those of sequence i are rows cu_seqlens[i] to cu_seqlens[i + 1] (cu_seqlens
    [B + 1] int64). Nothing is computed of padding, for there is none, and a sequence's result does not depend
    on the others.

    With `window` = w a token sees itself and the w tokens to each side. `bias` [H, 2 R + 1] of the dtype of q
    is added to the scores by how far the key lies behind the query: bias[:, R + key - query], that distance
    cut to R either way.
    """
    return _varlen_attention(q, k, v, cu_seqlens, scale, window, bias)


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
