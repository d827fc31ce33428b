"""Every operator in plain torch, written to be read: the oracle of the tests, and what runs on a device that
has no implementation of its own.

Each function's signature is that of the operator's other implementations too, on a CPU and on a GPU. `ops`
makes of it the operator of torch.library, which takes tensors and numbers one by one.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastserve_kernels.attention_metadata import Batch
from fastserve_kernels.formats import (
    FP8,
    LARGEST_FP8,
    NF4,
    Bitmap,
    BlockSparse,
    Int4,
    Int8,
    Sparse24,
    Sparse24Int4,
    Weight,
)
from fastserve_kernels.formats.prepared import (
    BitmapArguments,
    BlockSparseArguments,
    DenseArguments,
    FP8Arguments,
    IntArguments,
    IntRowsArguments,
    LowRankArguments,
    NF4Arguments,
    Sparse24Arguments,
    Sparse24Int4Arguments,
    W8A8Arguments,
)
from fastserve_kernels.kv_cache import KVCache

ACTIVATION_GROUP = 128
"""Columns of a token that share a scale, at most, where activations are rounded to 8 bits by groups."""
SMALLEST_STEP = 1e-30
"""Of such activations: the inverse of a smaller one might overflow."""
MIN_TEMPERATURE = 1e-5
"""Lower ones, which might overflow, count as this."""


def linear(x: Tensor, weight: DenseArguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """torch's own product, which is what runs on a GPU: the residual is added to its sums before they are
    rounded."""
    (matrix,) = weight
    if residual is None:
        return torch.nn.functional.linear(x, matrix, bias)
    y = torch.addmm(residual, x, matrix.T)
    return y if bias is None else y.add_(bias)


def _product(x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """In float32, rounded once."""
    return _finish(x.float() @ weight.dequantize().T, x.dtype, bias, residual)


def _product_a8(x: Tensor, weight: Int4 | Int8, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Of `quantized_activations`."""
    total = quantized_activations(x, weight.group_size) @ weight.dequantize().T
    return _finish(total, x.dtype, bias, residual)


def _finish(y: Tensor, dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if bias is not None:
        y = y + bias.float()
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype)


def linear_int4(x: Tensor, weight: IntArguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [T, K] by an `Int4` (uint8 codes [N, K / 2]), bias [N], residual [T, N]: [T, N] of x's dtype."""
    codes, scales, zeros, _, group_size = weight
    return _product(x, Int4(codes, scales, zeros, group_size), bias, residual)


def linear_int8(x: Tensor, weight: IntArguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [T, K] by an `Int8` (int8 values [N, K]), bias [N], residual [T, N]: [T, N] of x's dtype."""
    values, scales, zeros, _, group_size = weight
    return _product(x, Int8(values, scales, zeros, group_size), bias, residual)


def linear_int4_a8(x: Tensor, weight: IntArguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`linear_int4` of `quantized_activations`."""
    codes, scales, zeros, _, group_size = weight
    return _product_a8(x, Int4(codes, scales, zeros, group_size), bias, residual)


def linear_int8_a8(x: Tensor, weight: IntArguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`linear_int8` of `quantized_activations`."""
    values, scales, zeros, _, group_size = weight
    return _product_a8(x, Int8(values, scales, zeros, group_size), bias, residual)


def quantized_activations(x: Tensor, group_size: int) -> Tensor:
    """x [T, K] rounded to int8, float32: each group of columns of a token to multiples of its max|x| / 127.

    A group of activations is one of the weight's, of ACTIVATION_GROUP columns at most. Halves are rounded to
    even, after multiplication by the inverse of the step; a step of at most SMALLEST_STEP counts as 0.
    """
    size = min(group_size, ACTIVATION_GROUP)
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    step = groups.abs().amax(-1, keepdim=True) / 127
    rounded = (groups * (1 / step)).round().masked_fill(step <= SMALLEST_STEP, 0.0)
    return (rounded * step).flatten(1)[:, : x.shape[1]]


def linear_int_rows(
    x: Tensor, weight: IntRowsArguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """An `Int4` above an `Int8`, either of which may be None; row i of these is row rows[i] of the weight."""
    narrow, narrow_scales, narrow_zeros, wide, wide_scales, wide_zeros, rows, _, _, group_size = weight
    parts = []
    if narrow is not None and narrow_scales is not None:
        parts.append(Int4(narrow, narrow_scales, narrow_zeros, group_size).dequantize())
    if wide is not None and wide_scales is not None:
        parts.append(Int8(wide, wide_scales, wide_zeros, group_size).dequantize())
    return _finish(x.float() @ torch.cat(parts)[rows.argsort()].T, x.dtype, bias, residual)


def linear_nf4(x: Tensor, weight: NF4Arguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [T, K] by an `NF4` (uint8 codes [N, K / 2], codebook [16]), bias, residual: [T, N]."""
    codes, scales, codebook, _, group_size = weight
    return _product(x, NF4(codes, scales, codebook, group_size), bias, residual)


def linear_fp8(x: Tensor, weight: FP8Arguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [T, K] by an `FP8` (float8_e4m3fn values [N, K]), bias [N], residual [T, N]: [T, N]."""
    values, scales, _, group_size = weight
    return _product(x, FP8(values, scales, group_size), bias, residual)


def linear_w8a8(x: Tensor, weight: W8A8Arguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [T, K], rounded to int8 token by token, by a `W8A8`, bias [N], residual [T, N]: [T, N].

    The scale of a token is max|x| / 127; halves are rounded to even, and sums of integers are exact.
    """
    values, scales, _ = weight
    step = x.float().abs().amax(-1, keepdim=True) / 127
    rounded = (x.float() / step).round().masked_fill(step == 0, 0.0)
    total = rounded.double() @ values.double().T  # integers below 2^53: exact
    return _finish(total.float() * step * scales, x.dtype, bias, residual)


def linear_sparse24(
    x: Tensor, weight: Sparse24Arguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x [T, K] by a `Sparse24` (values [N, K / 2], indices [N, K / 8]), bias, residual: [T, N]."""
    values, indices, _ = weight
    return _product(x, Sparse24(values, indices), bias, residual)


def linear_sparse24_int4(
    x: Tensor, weight: Sparse24Int4Arguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x [T, K] by a `Sparse24Int4` (uint8 codes [N, K / 4]), bias, residual: [T, N]."""
    codes, indices, scales, _, group_size = weight
    return _product(x, Sparse24Int4(codes, indices, scales, group_size), bias, residual)


def linear_block_sparse(
    x: Tensor, weight: BlockSparseArguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x [T, K] by a `BlockSparse` (blocks [B, bn, bk]), bias [N], residual [T, N]: [T, N]."""
    blocks, row_starts, columns, out_features = weight
    plain = BlockSparse(blocks, row_starts, columns, (out_features, x.shape[1]))
    return _product(x, plain, bias, residual)


def linear_bitmap(x: Tensor, weight: BitmapArguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [T, K] by a `Bitmap` (values [nnz], mask [N, ceil(K / 8)]), bias, residual: [T, N]."""
    values, mask, row_starts, _ = weight
    return _product(x, Bitmap(values, mask, row_starts, x.shape[1]), bias, residual)


def linear_low_rank(
    x: Tensor, weight: LowRankArguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x [T, K] by a `LowRank`, down [R, K] then up [N, R], bias [N], residual [T, N]: [T, N]."""
    down, up = weight
    return _finish(x.float() @ down.float().T @ up.float().T, x.dtype, bias, residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm`: the normed x is rounded to its dtype before the weight, as LlamaRMSNorm does."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`ops.add_rms_norm`: the sum is rounded to x's dtype before it is normed."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def swiglu(gate_up: Tensor) -> Tensor:
    """`ops.swiglu`: silu is rounded to the dtype before the product."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim = cos.shape[-1]
    turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * cos[:, None] + swapped * sin[:, None], kept), dim=-1)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.rotary`: both products are rounded, and so is their sum."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """`ops.write_kv`."""
    for new, stored, scale in ((k, cache.keys, cache.k_scale), (v, cache.values, cache.v_scale)):
        finite = torch.where(new.isfinite(), new, 0.0)
        rounded = finite.to(stored.dtype) if scale is None else _quantize(finite, scale, stored.dtype)
        stored.flatten(0, 1)[slot_mapping] = rounded


def _quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, Hk, D] / scale [Hk], rounded half to even, in int8 or float8_e4m3fn."""
    scaled = x.float() / scale[:, None]
    if dtype == torch.int8:
        return scaled.round().clamp(-127, 127).to(dtype)
    return scaled.clamp(-LARGEST_FP8, LARGEST_FP8).to(dtype)


def rotary_write_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, slot_mapping: Tensor
) -> Tensor:
    """`ops.rotary_write_kv`."""
    q, k = rotary(q, k, cos, sin)
    write_kv(k, v, cache, slot_mapping)
    return q


def paged_attention(
    q: Tensor, cache: KVCache, batch: Batch, scale: float, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """`ops.paged_attention`, sequence by sequence; scores and softmax are float32."""
    query_start, context_lens, block_tables = batch
    group = q.shape[1] // cache.keys.shape[2]
    out = q.new_empty(q.shape[0], q.shape[1], cache.values.shape[3])
    starts = query_start.tolist()
    for i, context_len in enumerate(context_lens.tolist()):
        queries = q[starts[i] : starts[i + 1]].float().transpose(0, 1)
        keys = _cached(cache.keys, cache.k_scale, block_tables[i], context_len)
        values = _cached(cache.values, cache.v_scale, block_tables[i], context_len)
        keys = keys.permute(1, 2, 0).repeat_interleave(group, dim=0)
        values = values.transpose(0, 1).repeat_interleave(group, dim=0)
        scores = queries @ keys * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        key_position = torch.arange(context_len, device=q.device)
        query_position = key_position[context_len - queries.shape[1] :, None]
        seen = key_position <= query_position
        if sliding_window is not None:
            seen &= key_position > query_position - sliding_window
        probabilities = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[starts[i] : starts[i + 1]] = (probabilities @ values).transpose(0, 1).to(q.dtype)
    return out


def _cached(cache: Tensor, scale: Tensor | None, blocks: Tensor, context_len: int) -> Tensor:
    """The keys or values [context_len, Hk, D] float32 of a sequence."""
    found = cache[blocks].flatten(0, 1)[:context_len].float()
    return found if scale is None else found * scale[:, None]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    bias: Tensor | None,
) -> Tensor:
    """`ops.varlen_attention`, sequence by sequence; scores and softmax are float32."""
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    starts = cu_seqlens.tolist()
    for start, end in pairwise(starts):
        queries, keys, values = (x[start:end].float().transpose(0, 1) for x in (q, k, v))
        scores = queries @ keys.transpose(1, 2) * scale
        position = torch.arange(end - start, device=q.device)
        distance = position - position[:, None]
        if bias is not None:
            farthest = bias.shape[1] // 2
            scores += bias.float()[:, distance.clamp(-farthest, farthest) + farthest]
        if window is not None:
            scores = scores.masked_fill(distance.abs() > window, float("-inf"))
        out[start:end] = (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)
    return out


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """`ops.sample`, by a stable sort of each row and probabilities in float64."""
    greedy = temperature == 0
    filtered = (top_k > 0) | (top_p < 1) | (min_p > 0)
    scaled = logits.float() / temperature.float().clamp(min=MIN_TEMPERATURE)[:, None]
    vocabulary = logits.shape[-1]
    place = torch.arange(vocabulary, device=logits.device)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.double().softmax(-1)
    limit = torch.where(top_k > 0, top_k, vocabulary)[:, None]
    probabilities = probabilities.masked_fill(place >= limit, 0.0)
    probabilities /= probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    beyond = (before >= top_p.double()[:, None]) & (place > 0) & (top_p < 1)[:, None]
    probabilities = probabilities.masked_fill(beyond, 0.0)
    probabilities = probabilities.masked_fill(probabilities < min_p[:, None] * probabilities[:, :1], 0.0)
    probabilities = torch.where(filtered[:, None], probabilities, scaled.double().softmax(-1))
    order = torch.where(filtered[:, None], order, place)
    cumulative = probabilities.cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True)
    last = vocabulary - 1 - (probabilities > 0).flip(-1).byte().argmax(-1, keepdim=True)
    drawn = order.gather(1, torch.minimum(chosen, last))[:, 0]
    return torch.where(greedy, logits.argmax(-1), drawn)


def log_probs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.log_probs`, by a stable sort of each row."""
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    chosen = token_ids[:, None]
    rank = (logits > logits.gather(1, chosen)).sum(-1) + 1
    top_ids = logits.argsort(dim=-1, descending=True, stable=True)[:, :k]
    return logprobs.gather(1, chosen)[:, 0], rank, top_ids, logprobs.gather(1, top_ids)
