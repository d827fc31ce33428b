"""2:4 weights, of floats or of four-bit integers, on a GPU: their packing, launches and configs.

The kernels, and how they decode, are in `sparse24_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve_kernels.formats.prepared import Prepared, Sparse24Arguments, Sparse24Int4Arguments
from fastserve_kernels.formats.sparse import Sparse24, Sparse24Int4
from fastserve_kernels.formats.weight import Weight, unpack_pairs
from fastserve_kernels.gpu.launch import Config, Launch
from fastserve_kernels.gpu.linear_call import (
    Added,
    call_linear,
    linear_cost,
    random_linear,
    split_k_launch,
    splits_for,
    words_of_fours,
)
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.quantized_linear import check_device
from fastserve_kernels.gpu.sparse24_kernels import CHUNKS, GROUPS, sparse24, sparse24_int4

TILE = 4 * CHUNKS.value * GROUPS.value
"""Columns of a tile."""


def prepare(weight: Weight, device: torch.device, dtype: torch.dtype) -> Prepared:
    """Packs a `Sparse24` or `Sparse24Int4` as the kernels read it, floats in the activations' dtype.

    Raises ValueError if it is another format, or the device cannot multiply by it.
    """
    check_device(weight.operator, device)
    weight = weight.to(device)
    if isinstance(weight, Sparse24):
        values = _tiled(weight.values.to(dtype).unflatten(1, (-1, 2))).permute(1, 2, 4, 0, 3).contiguous()
        arguments: tuple[Tensor | int, ...] = (values, _patterns(weight.indices), weight.out_features)
    elif isinstance(weight, Sparse24Int4):
        codes = _tiled((unpack_pairs(weight.codes).int() ^ 8).unflatten(1, (-1, 2)))
        arguments = (
            _words(codes.permute(1, 4, 0, 3, 2)),
            _patterns(weight.indices),
            _whole_tiles(weight.scales, TILE // weight.group_size).t().contiguous(),
            weight.out_features,
            weight.group_size,
        )
    else:
        raise ValueError(f"weight must be Sparse24 or Sparse24Int4, not {type(weight).__name__}")
    return Prepared(weight.operator, arguments, weight.out_features, weight.in_features)


def _tiled(groups: Tensor) -> Tensor:
    """[N, groups, ...] as [N, tiles, CHUNKS, GROUPS, ...], filled up with zeros."""
    return _whole_tiles(groups, CHUNKS.value * GROUPS.value).unflatten(1, (-1, CHUNKS.value, GROUPS.value))


def _whole_tiles(columns: Tensor, per_tile: int) -> Tensor:
    """[N, columns, ...], of which a tile has `per_tile`, filled up with zeros to whole tiles."""
    n, count, *rest = columns.shape
    return torch.cat((columns, columns.new_zeros(n, -count % per_tile, *rest)), dim=1)


def _words(nibbles: Tensor) -> Tensor:
    """[..., CHUNKS] int32 from 0 to 15 as [...] int16, the first chunk in the lowest bits."""
    shifts = 4 * torch.arange(CHUNKS.value, dtype=torch.int32, device=nibbles.device)
    return (nibbles << shifts).sum(-1, dtype=torch.int32).to(torch.int16)


def _patterns(indices: Tensor) -> Tensor:
    """The indices of `Sparse24` as pattern words [tiles, N, GROUPS] int16."""
    nibbles = unpack_pairs(indices).int()
    return _words(_tiled(1 << (nibbles & 3) | 1 << (nibbles >> 2)).permute(1, 0, 3, 2))


def plan_sparse24(
    x: Tensor, weight: Sparse24Arguments, added: Added, out: Tensor, *, config: Config
) -> list[Launch]:
    """x [M, K] and out [M, N] contiguous, of the values' dtype; the weight as `prepare` made it."""
    values, patterns, _ = weight
    return _plan(sparse24, x, {"values": values, "patterns": patterns}, {}, added, out, config)


def plan_sparse24_int4(
    x: Tensor, weight: Sparse24Int4Arguments, added: Added, out: Tensor, *, config: Config
) -> list[Launch]:
    """x [M, K] and out [M, N] contiguous; the weight as `prepare` made it."""
    codes, patterns, scales, _, group_size = weight
    pointers = {"codes": codes, "patterns": patterns, "scales": scales}
    return _plan(sparse24_int4, x, pointers, {"GROUP": group_size}, added, out, config)


def _plan(
    kernel: object,
    x: Tensor,
    weight: dict[str, Tensor],
    constants: dict[str, int],
    added: Added,
    out: Tensor,
    config: Config,
) -> list[Launch]:
    config = _FLOAT32 if x.dtype == torch.float32 else config
    k = x.shape[1]
    pointers = {"x": words_of_fours(x), **weight}
    constants = {**constants, **config.constants, "EVEN_K": k % TILE == 0}
    return [split_k_launch(kernel, pointers, added, out, k, constants, config)]


_FLOAT32 = Config({"BLOCK_M": 16, "BLOCK_N": 32, "SPLITS": 1}, num_warps=4, num_stages=1)
"""For float32, which no tensor core takes unshortened: so small that registers and shared memory suffice."""
_TILES: dict[int, tuple[tuple[int, int], ...]] = {
    8: ((64, 2), (64, 4), (128, 4), (32, 1)),
    16: ((32, 2), (64, 2), (64, 4), (32, 1)),
    32: ((64, 4), (128, 8), (32, 2)),
    64: ((128, 8), (64, 4)),
    128: ((128, 8),),
}
"""By BLOCK_M, (BLOCK_N, warps): where few tokens are multiplied, 32 or 16 rows of the weight per warp."""


def _candidates(shape: Shape, most_tokens: int) -> list[Config]:
    m, n, steps = shape["m"], shape["n"], -(-shape["k"] // TILE)
    block_m = next(size for size in _TILES if m <= size or size == most_tokens)
    found = []
    for block_n, warps in _TILES[block_m]:
        if (block_m, block_n, warps) == (8, 64, 4) and shape.get("group_size") == 32:
            continue  # the one tile that the compiler spills registers for
        programs = -(-m // block_m) * -(-n // block_n)
        splits = splits_for(programs, steps)
        for tried in dict.fromkeys((splits, max(splits // 2, 1))):
            constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "SPLITS": tried}
            found += [Config(constants, warps, stages) for stages in ((2,) if block_m == 128 else (3, 4, 2))]
    return found[:16]


def sparse24_candidates(shape: Shape) -> list[Config]:
    """Tiles for the kernel of floats."""
    return _candidates(shape, 128)


def sparse24_int4_candidates(shape: Shape) -> list[Config]:
    """Tiles for the kernel of integers: of at most 64 tokens, as the sums of a scale group need registers."""
    return _candidates(shape, 64)


def linear_sparse24(
    x: Tensor, weight: Sparse24Arguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """`reference.linear_sparse24` on a GPU."""
    shape = {"m": x.shape[0], "n": weight[-1], "k": x.shape[1]}
    return call_linear(_FLOATS, shape, x, weight, (bias, residual))


def linear_sparse24_int4(
    x: Tensor, weight: Sparse24Int4Arguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """`reference.linear_sparse24_int4` on a GPU."""
    *_, out_features, group_size = weight
    shape = {"m": x.shape[0], "n": out_features, "k": x.shape[1], "group_size": group_size}
    return call_linear(_INTEGERS, shape, x, weight, (bias, residual))


def _bits(patterns: Tensor) -> Tensor:
    """Pattern words [tiles, N, GROUPS] as bits [N, tiles, CHUNKS, GROUPS, 4]."""
    shifts = torch.arange(4 * CHUNKS.value, device=patterns.device)
    bits = (patterns[..., None].int() >> shifts & 1).unflatten(-1, (CHUNKS.value, 4))
    return bits.permute(1, 0, 3, 2, 4)


def _product(x: Tensor, kept: Tensor, patterns: Tensor) -> Tensor:
    """x times the weight of kept numbers [N, tiles, CHUNKS, GROUPS, 2] float32, in float32."""
    bits = _bits(patterns)
    w = torch.where(bits.cumsum(-1) == 1, kept[..., :1], kept[..., 1:]) * bits
    return x.float() @ w.flatten(1)[:, : x.shape[1]].t()


def _reference(x: Tensor, weight: Sparse24Arguments, *__: object) -> Tensor:
    values, patterns, _ = weight
    return _product(x, values.float().permute(3, 0, 1, 4, 2), patterns)


def _integer_reference(x: Tensor, weight: Sparse24Int4Arguments, *__: object) -> Tensor:
    codes, patterns, scales, _, group_size = weight
    shifts = 4 * torch.arange(CHUNKS.value, device=codes.device)
    kept = ((codes[..., None].int() >> shifts & 15) ^ 8) - 8
    per_group = scales.float().t().repeat_interleave(group_size // 4, dim=1)
    scaled = kept.permute(2, 0, 4, 3, 1) * _tiled(per_group[..., None])
    return _product(x, scaled, patterns)


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    kept = shape["n"] * shape["k"] // 2
    return linear_cost(shape, dtype, kept * dtype.itemsize + kept // 4, kept)


def _integer_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    kept = shape["n"] * shape["k"] // 2
    scales = 2 * kept // shape["group_size"] * dtype.itemsize
    return linear_cost(shape, dtype, kept // 2 + kept // 4 + scales, kept)


_SIZES: tuple[Shape, ...] = tuple({"m": m, "n": 128, "k": 1024} for m in (8, 16, 32, 64, 128))
_FLOATS = Operator(
    name="linear_sparse24",
    inputs=random_linear(lambda w, _: Sparse24.pack(w), prepare),
    plan=plan_sparse24,
    candidates=sparse24_candidates,
    cost=_cost,
    compiled_shapes=(*_SIZES, {"m": 8, "n": 128, "k": 1000}),
    reference=_reference,
)
_INTEGERS = Operator(
    name="linear_sparse24_int4",
    inputs=random_linear(lambda w, shape: Sparse24Int4.pack(w, shape["group_size"]), prepare),
    plan=plan_sparse24_int4,
    candidates=sparse24_int4_candidates,
    cost=_integer_cost,
    compiled_shapes=tuple({**size, "group_size": group} for group in (128, 32) for size in _SIZES[:4]),
    reference=_integer_reference,
)
OPERATORS = (_FLOATS, _INTEGERS)
