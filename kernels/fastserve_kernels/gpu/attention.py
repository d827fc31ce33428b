"""`ops.paged_attention` on a GPU: the launches of `decode_attention` and `prefill_attention` for a batch.

How many programs run, and which kernels, follows from the shapes of the tensors alone, never from the lengths
in them: nothing waits for the GPU, and a CUDA graph that was captured for some shapes serves all lengths. A
batch with one token for each sequence, as all have that only decode, needs decode's kernels alone; any other
gets both, and each takes the sequences that are its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.attention_metadata import Batch
from fastserve_kernels.gpu import decode_attention, prefill_attention
from fastserve_kernels.gpu.launch import Argument, Config, Launch, launch_all
from fastserve_kernels.gpu.operator import Cost, Operator, Shape
from fastserve_kernels.gpu.tuning import config_for
from fastserve_kernels.kv_cache import KVCache

MIN_ROWS = 16
"""Rows that a product on tensor cores has at least."""
SCAN = 256
"""Sequences whose lengths a program looks at together to find its own."""
INTERPRETED_SMS = 3
SHARED_BYTES = 216 * 1024
"""Shared memory of a multiprocessor that tiles may take."""
CACHE_DTYPES = {2: torch.int8, 3: torch.float8_e4m3fn}
"""By a shape's cache_format; 1 is the dtype of the activations."""


def paged_attention(
    q: Tensor, cache: KVCache, batch: Batch, scale: float, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """`ops.paged_attention`.

    Raises ValueError if the elements of a cache's heads lie apart, or scales do not go with a cache's dtype.
    """
    q = q if q.stride(2) == 1 else q.contiguous()
    _check_cache(cache.keys, cache.k_scale, "k")
    _check_cache(cache.values, cache.v_scale, "v")
    out = q.new_empty(q.shape[0], q.shape[1], cache.values.shape[3])
    if out.numel() == 0:
        return out
    _, _, block_tables = batch
    inputs = (q, cache, batch, scale, sliding_window, softcap, out)
    shape = _shape_of(q, cache.keys, cache.values, block_tables)
    for operator in OPERATORS[: 1 if _one_token_each(q, block_tables) else 2]:
        launch_all(operator.plan(*inputs, config=config_for(operator, shape, q.device)))
    return out


def _check_cache(cache: Tensor, scale: Tensor | None, name: str) -> None:
    if cache.stride(3) != 1:
        raise ValueError(f"{name}_cache: the elements of a head lie {cache.stride(3)} apart, must be 1")
    if (cache.dtype in CACHE_DTYPES.values()) != (scale is not None):
        raise ValueError(
            f"{name}_cache is {cache.dtype} and {name}_scale {'absent' if scale is None else 'given'}: "
            "int8 and float8_e4m3fn have a scale, others none"
        )


def _one_token_each(q: Tensor, block_tables: Tensor) -> bool:
    """Whether each sequence has one token: none is without, so the numbers of both tell."""
    return q.shape[0] <= block_tables.shape[0]


def _shape_of(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor) -> dict[str, int]:
    """Sizes that change from step to step are rounded up to powers of two."""
    formats = {dtype: number for number, dtype in CACHE_DTYPES.items()}
    return {
        "batch": triton.next_power_of_2(block_tables.shape[0]),
        "tokens": triton.next_power_of_2(q.shape[0]),
        "context": triton.next_power_of_2(block_tables.shape[1] * k_cache.shape[1]),
        "heads": q.shape[1],
        "kv_heads": k_cache.shape[2],
        "dim": q.shape[2],
        "dim_v": v_cache.shape[3],
        "block_size": k_cache.shape[1],
        "cache_format": formats.get(k_cache.dtype, 1),
    }


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU; interpreted, a few."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _codes(cache: Tensor) -> Tensor:
    """float8 as the bytes that the kernels decode themselves."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _arguments(*inputs: Any) -> dict[str, Argument]:
    """What both kernels are given."""
    q, cache, batch, scale, sliding_window, softcap, out = inputs
    k_cache, v_cache, k_scale, v_scale = cache
    query_start, context_lens, block_tables = batch
    return {
        "q": q,
        "k_cache": _codes(k_cache),
        "v_cache": _codes(v_cache),
        "query_start": query_start,
        "context_lens": context_lens,
        "block_tables": block_tables,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "out": out,
        "sequences": block_tables.shape[0],
        "scale": scale,
        "window": sliding_window or 0,
        "softcap": softcap or 0.0,
        "q_token": q.stride(0),
        "q_head": q.stride(1),
        "k_block": k_cache.stride(0),
        "k_position": k_cache.stride(1),
        "k_head": k_cache.stride(2),
        "v_block": v_cache.stride(0),
        "v_position": v_cache.stride(1),
        "v_head": v_cache.stride(2),
        "table_row": block_tables.stride(0),
    }


def _constants(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, sliding_window: int | None, softcap: float | None
) -> dict[str, Any]:
    """The compile-time sizes of both kernels."""
    return {
        "GROUP": q.shape[1] // k_cache.shape[2],
        "KV_HEADS": k_cache.shape[2],
        "BLOCK_SIZE": k_cache.shape[1],
        "DIM": q.shape[2],
        "DIM_V": v_cache.shape[3],
        "WINDOWED": sliding_window is not None,
        "CAPPED": softcap is not None,
        "SCAN": SCAN,
        "BLOCK_D": max(triton.next_power_of_2(q.shape[2]), 16),
        "BLOCK_DV": max(triton.next_power_of_2(v_cache.shape[3]), 16),
    }


def _decode_rows(group: int) -> int:
    return max(triton.next_power_of_2(group), MIN_ROWS)


def _decoded_queries(q: Tensor, block_tables: Tensor, group: int) -> int:
    """Sequences of more tokens are prefill's."""
    return 1 if _one_token_each(q, block_tables) else _decode_rows(group) // group


def _for_dtype(config: Config, dtype: torch.dtype) -> Config:
    """Tensor cores do not multiply float32 as it is: it has small tiles, whatever was tuned for others."""
    if dtype != torch.float32:
        return config
    return Config({**config.constants, "BLOCK_M": MIN_ROWS, "BLOCK_N": 32}, num_stages=2)


def plan_decode(*inputs: Any, config: Config) -> list[Launch]:
    """inputs: those of the operator, and out [T, H, Dv]."""
    q, (k_cache, v_cache, *_), (_, _, block_tables), _, sliding_window, softcap, _ = inputs
    arguments = _arguments(*inputs)
    constants = _constants(q, k_cache, v_cache, sliding_window, softcap)
    config = _for_dtype(config, q.dtype)
    rows, group = _decode_rows(constants["GROUP"]), constants["GROUP"]
    queries = _decoded_queries(q, block_tables, group)
    programs = config.constants["PROGRAMS_PER_SM"] * multiprocessors(q.device)
    arguments["parts"] = q.new_empty(2 * programs, rows, v_cache.shape[3], dtype=torch.float32)
    arguments["logs"] = q.new_empty(2 * programs, rows, dtype=torch.float32)
    constants |= {"QUERIES": queries, "BLOCK_M": rows, "BLOCK_N": config.constants["BLOCK_N"]}
    of_combine = ("query_start", "context_lens", "parts", "logs", "out", "sequences", "window")
    not_of_combine = {"BLOCK_SIZE", "DIM", "CAPPED", "BLOCK_D"}
    return [
        Launch(
            decode_attention.decode, (programs,), arguments, constants, config.num_warps, config.num_stages
        ),
        Launch(
            decode_attention.combine,
            (block_tables.shape[0] * queries, q.shape[1]),
            {name: arguments[name] for name in of_combine} | {"programs": programs},
            {name: value for name, value in constants.items() if name not in not_of_combine},
            num_warps=4,
        ),
    ]


def plan_prefill(*inputs: Any, config: Config) -> list[Launch]:
    """inputs: those of the operator, and out [T, H, Dv]."""
    q, (k_cache, v_cache, *_), (_, _, block_tables), _, sliding_window, softcap, _ = inputs
    constants = _constants(q, k_cache, v_cache, sliding_window, softcap)
    config, group = _for_dtype(config, q.dtype), constants["GROUP"]
    rows = max(config.constants["BLOCK_M"], triton.next_power_of_2(group))
    constants |= {
        "QUERIES": rows // group,
        "DECODED": _decoded_queries(q, block_tables, group),
        "BLOCK_M": rows,
        "BLOCK_N": config.constants["BLOCK_N"],
    }
    tiles = q.shape[0] // (rows // group) + block_tables.shape[0]
    return [
        Launch(
            prefill_attention.prefill,
            (tiles * k_cache.shape[2],),
            _arguments(*inputs),
            constants,
            config.num_warps,
            config.num_stages,
        )
    ]


def _key_bytes(shape: Shape) -> int:
    """Bytes of a key and a value of a head in a tile; the activations' dtype is taken to have two bytes."""
    size = 2 if shape["cache_format"] == 1 else 1
    return size * (triton.next_power_of_2(shape["dim"]) + triton.next_power_of_2(shape["dim_v"]))


def decode_candidates(shape: Shape) -> list[Config]:
    """(keys of a tile, stages, programs per multiprocessor, warps), those that fit its shared memory."""
    warps = 8 if max(shape["dim"], shape["dim_v"]) > 128 else 4
    tried = [(64, 4, 2, warps), (64, 3, 2, warps), (64, 3, 3, warps), (64, 2, 3, warps), (32, 4, 4, 4)]
    tried += [(32, 4, 2, 4), (64, 4, 1, warps), (128, 3, 2, warps), (128, 3, 1, 8), (128, 2, 2, 8)]
    tried += [(32, 3, 1, 4), (16, 2, 1, 2)]
    return [
        Config({"BLOCK_N": block_n, "PROGRAMS_PER_SM": per_sm}, warps, stages)
        for block_n, stages, per_sm, warps in tried
        if per_sm * (stages - 1) * block_n * _key_bytes(shape) <= SHARED_BYTES
    ]


def prefill_candidates(shape: Shape) -> list[Config]:
    """(rows of a tile, keys of a tile, stages, warps), those that fit shared memory."""
    tried = [(128, 64, 3, 8), (128, 32, 3, 8), (128, 64, 2, 8), (128, 128, 2, 8), (64, 64, 3, 4)]
    tried += [(64, 64, 3, 8), (64, 32, 3, 4)]
    if max(shape["dim"], shape["dim_v"]) > 64:
        # Registers for 64 keys are there on sm_90, whose tensor cores take them from shared memory.
        tried[:2] = [tried[1], tried[0]]
    if max(shape["dim"], shape["dim_v"]) > 128:
        tried = [(64, 32, 3, 8), (64, 32, 2, 8), (64, 16, 2, 8)]
    row_bytes = 2 * triton.next_power_of_2(shape["dim"])
    return [
        Config({"BLOCK_M": rows, "BLOCK_N": block_n}, warps, stages)
        for rows, block_n, stages, warps in tried
        if stages * block_n * _key_bytes(shape) + rows * row_bytes <= SHARED_BYTES
    ]


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """A batch whose tokens are spread evenly over its sequences, all of the same context."""
    batch, tokens, context, size = shape["batch"], shape["tokens"], shape["context"], shape["block_size"]
    width = -(-context // size)
    cache_dtype = CACHE_DTYPES.get(shape["cache_format"], dtype)

    def cache(dim: int) -> Tensor:
        blocks = (batch * width, size, shape["kv_heads"], dim)
        if cache_dtype == torch.int8:
            return torch.randint(-127, 128, blocks, dtype=torch.int8, device=device)
        return torch.randn(blocks, dtype=dtype, device=device).to(cache_dtype)

    scales = None
    if cache_dtype != dtype:
        scales = torch.full((shape["kv_heads"],), 0.02, device=device)
    q = torch.randn(tokens, shape["heads"], shape["dim"], dtype=dtype, device=device)
    sequences = (
        torch.arange(batch + 1, device=device) * tokens // batch,
        torch.full((batch,), context, device=device),
        torch.randperm(batch * width, device=device).view(batch, width),
    )
    caches = KVCache(cache(shape["dim"]), cache(shape["dim_v"]), scales, scales)
    out = q.new_empty(tokens, shape["heads"], shape["dim_v"])
    return (q, caches, sequences, shape["dim"] ** -0.5, None, None, out)


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """Each of n tokens of a sequence sees (n - 1) / 2 keys less than the last one, on average."""
    size = dtype.itemsize if shape["cache_format"] == 1 else 1
    dims = shape["dim"] + shape["dim_v"]
    pairs = shape["tokens"] * (shape["context"] - (shape["tokens"] // shape["batch"] - 1) / 2)
    return Cost(
        bytes=shape["batch"] * shape["context"] * shape["kv_heads"] * dims * size
        + shape["tokens"] * shape["heads"] * dims * dtype.itemsize,
        flops=int(2 * pairs * shape["heads"] * dims),
    )


def _reference(*inputs: Any) -> Tensor:
    q, *others, _ = inputs
    return reference.paged_attention(q.float(), *others)


def _shapes(batch: int, tokens: int, context: int) -> Iterator[Shape]:
    names = ("heads", "kv_heads", "dim", "dim_v", "block_size", "cache_format")
    for sizes in (
        (32, 8, 128, 128, 16, 1),
        (9, 3, 64, 64, 16, 1),
        (32, 8, 128, 128, 16, 2),
        (32, 8, 128, 128, 16, 3),
        (16, 16, 80, 80, 32, 1),
        (8, 4, 256, 256, 32, 1),
    ):
        step = {"batch": batch, "tokens": tokens, "context": context}
        yield step | dict(zip(names, sizes, strict=True))


OPERATORS = (
    Operator(
        name="paged_attention_decode",
        inputs=_inputs,
        plan=plan_decode,
        candidates=decode_candidates,
        cost=_cost,
        compiled_shapes=tuple(_shapes(4, 4, 128)),
        reference=_reference,
    ),
    Operator(
        name="paged_attention_prefill",
        inputs=_inputs,
        plan=plan_prefill,
        candidates=prefill_candidates,
        cost=_cost,
        compiled_shapes=tuple(_shapes(2, 256, 256)),
        reference=_reference,
    ),
)
"""Two parts of one operator, tuned apart: decode, then prefill."""
