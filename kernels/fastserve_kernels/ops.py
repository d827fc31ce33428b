"""The public functions. They check no more than torch does: callers pass the shapes and dtypes named here.

Each is an operator of torch.ops.fastserve, whose schema is the annotated signature of its function in
`reference`. `_define` registers all of its implementations: that of `cpu`; that of `gpu.registry` on a GPU of
NVIDIA; the function of `reference` on any other device, and where there is none of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.cpu import linears, operators, sampling
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.triton_requirement import require_triton

Function = Callable[..., Any]

_library = torch.library.Library("fastserve", "DEF")


def _define(
    function: Function,
    fake: Function,
    cpu: Function | None = None,
    gpu: bool = True,
    mutates: tuple[str, ...] = (),
) -> Function:
    """Defines the operator of a function of `reference`; `mutates` are the parameters that it writes to.

    Gives the one overload that it has: to find it at each call would cost 0.3 us.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    # Integers are a layer's sizes, the same at each call: nothing need be traced through them.
    _library.define(name + schema.replace("SymInt", "int"))
    torch.library.register_fake(f"fastserve::{name}", fake, lib=_library)
    _library.impl(name, function, "CompositeExplicitAutograd")
    if cpu is not None:
        _library.impl(name, cpu, "CPU")
    if gpu:
        _library.impl(name, _triton_implementation(function), "CUDA")
    overload: Function = getattr(torch.ops.fastserve, name).default
    return overload


def _triton_implementation(function: Function) -> Function:
    """The function's entry in `gpu.registry`, which is imported at the first call: Triton's compiler takes
    longer to import than all the rest."""
    implementation: Function | None = None

    def call(*arguments: Any) -> Any:
        nonlocal implementation
        if implementation is None:
            require_triton(function.__name__)
            from fastserve_kernels.gpu.registry import IMPLEMENTATIONS

            implementation = IMPLEMENTATIONS[function]
        return implementation(*arguments)

    return call


def _fake_linear(x: Tensor, *arguments: Any) -> Tensor:
    """The number of outputs is an argument, or else that of the rows of the last tensor of the weight."""
    *weight, _, _ = arguments
    out_features = next((a for a in weight if not isinstance(a, Tensor | None)), None)
    return x.new_empty(x.shape[0], weight[-1].shape[0] if out_features is None else out_features)


_CPU_LINEARS: Mapping[Function, Function | None] = {
    reference.linear_int4: linears.linear_int4,
    reference.linear_int8: linears.linear_int8,
    reference.linear_int_rows: linears.linear_int_rows,
    reference.linear_nf4: linears.linear_nf4,
    reference.linear_fp8: linears.linear_fp8,
    reference.linear_w8a8: linears.linear_w8a8,
    reference.linear_sparse24: None,
    reference.linear_sparse24_int4: None,
    reference.linear_block_sparse: linears.linear_block_sparse,
    reference.linear_bitmap: None,
    reference.linear_low_rank: linears.linear_low_rank,
}
"""The CPU's implementation of each; None for what `prepare` makes another format's weight on a CPU."""

LINEARS: dict[str, Function] = {
    "linear": _define(reference.linear, _fake_linear, linears.linear, gpu=False),
    **{function.__name__: _define(function, _fake_linear, cpu) for function, cpu in _CPU_LINEARS.items()},
}
"""What multiplies by a weight, by the operator that its format names; `registration` adds to it."""
# Where a CPU's dense weight lies in oneDNN's blocks, torch's dispatcher takes this key before the CPU's.
_library.impl("linear", linears.linear, "MkldnnCPU")

_rms_norm = _define(
    reference.rms_norm,
    lambda x, weight, eps: x.new_empty(x.shape),
    operators.rms_norm,
)
_add_rms_norm = _define(
    reference.add_rms_norm,
    lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    operators.add_rms_norm,
)
_swiglu = _define(
    reference.swiglu,
    lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
    operators.swiglu,
)
_rotary = _define(
    reference.rotary,
    lambda q, k, cos, sin: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
_write_kv = _define(
    reference.write_kv,
    lambda *_: None,
    operators.write_kv,
    mutates=("k_cache", "v_cache"),
)
_rotary_write_kv = _define(
    reference.rotary_write_kv,
    lambda q, *_: q.new_empty(q.shape),
    operators.rotary_write_kv,
    mutates=("k_cache", "v_cache"),
)
_paged_attention = _define(
    reference.paged_attention,
    lambda q, k_cache, v_cache, *_: q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3]),
    operators.paged_attention,
)
_sample = _define(
    reference.sample,
    lambda logits, *_: logits.new_empty(len(logits), dtype=torch.int64),
    sampling.sample,
)
_log_probs = _define(
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
