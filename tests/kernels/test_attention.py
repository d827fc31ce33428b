"""Paged attention: right, whatever the shapes; and the same to the bit, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastserve_kernels import ops, reference
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.kv_cache import KVCache

pytestmark = pytest.mark.usefixtures("poison")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
SCALE = 0.125
DEFAULTS: tuple[Any, ...] = (SCALE, None, None)
QUANTIZED = [torch.int8, torch.float8_e4m3fn]


def wanted_of(batch: Any, *options: Any) -> Tensor:
    """In float32, of caches as they are. The options are those of `came_of`."""
    cache = KVCache(batch.k_cache.float(), batch.v_cache.float(), *options[3:])
    options = (*options, *DEFAULTS[len(options) :])[:3]
    return reference.paged_attention(batch.q.float(), cache, batch.layout, *options)


def came_of(batch: Any, *options: Any) -> Tensor:
    """The options are scale, sliding window, softcap, the keys' scales and the values'."""
    return ops.paged_attention(batch.q, batch.cache(*options[3:]), batch.meta, *options[:3] or DEFAULTS)


def quantize(batch: Any, dtype: torch.dtype | None) -> tuple[Tensor | None, Tensor | None]:
    """Has the caches hold what `write_kv` puts there; gives the scales, which differ by head. None changes
    nothing."""
    if dtype is None:
        return None, None
    caches = batch.k_cache, batch.v_cache
    largest = 127 if dtype == torch.int8 else 448
    k_scale, v_scale = (torch.rand(2, caches[0].shape[2]) + 0.5) * 4 / largest
    batch.k_cache, batch.v_cache = (torch.zeros(cache.shape, dtype=dtype) for cache in caches)
    slots = torch.arange(len(caches[0]) * caches[0].shape[1])
    k, v = (cache.flatten(0, 1) for cache in caches)
    ops.write_kv(k, v, batch.cache(k_scale, v_scale), slots)
    return k_scale, v_scale


RAGGED = {
    "one token": ([1], [1]),
    "one decode": ([1], [220]),
    "decodes around block and partition bounds": ([1] * 9, [1, 15, 16, 17, 127, 128, 129, 256, 257]),
    "a prompt": ([100], [100]),
    "a later chunk": ([70], [300]),
    "chunks of a tile, less and more": ([63, 64, 65, 2], [63, 164, 265, 129]),
    "decodes and chunks mixed": ([1, 5, 1, 130, 1, 3], [20, 33, 1, 130, 700, 131]),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", RAGGED)
def test_equals_the_reference(
    case: str, dtype: torch.dtype, make_batch: Any, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    batch = make_batch(*RAGGED[case], dtype=dtype)
    came = came_of(batch)
    assert came.dtype == dtype
    assert rel_rms(came, wanted_of(batch)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 16, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("heads", "dims", "block_size"),
    [
        ((9, 3), (64, 64), 16),
        ((4, 4), (24, 40), 7),
        ((8, 1), (128, 64), 1),
        ((2, 2), (16, 16), 200),
        ((6, 2), (80, 80), 32),
        ((5, 1), (96, 128), 16),
        ((2, 1), (33, 7), 5),
    ],
)
def test_equals_the_reference_for_every_kind(
    heads: tuple[int, int],
    dims: tuple[int, int],
    block_size: int,
    softcap: float | None,
    window: int | None,
    dtype: torch.dtype,
    make_batch: Any,
    rel_rms: Callable[[Tensor, Tensor], float],
) -> None:
    lengths = RAGGED["decodes and chunks mixed"]
    batch = make_batch(*lengths, heads=heads, dims=dims, block_size=block_size, dtype=dtype)
    options = (dims[0] ** -0.5, window, softcap)
    assert rel_rms(came_of(batch, *options), wanted_of(batch, *options)) < TOLERANCE[dtype]


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_the_reference_whatever_the_batch(
    data: st.DataObject, make_batch: Any, rel_rms: Callable[[Tensor, Tensor], float]
) -> None:
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 200)), min_size=1, max_size=5))
    kv_heads, group = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 5)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    batch = make_batch(
        [query for query, _ in lengths],
        [query + before for query, before in lengths],
        heads=(kv_heads * group, kv_heads),
        dims=data.draw(st.tuples(st.integers(1, 130), st.integers(1, 130))),
        block_size=data.draw(st.integers(1, 70)),
        dtype=dtype,
    )
    window = data.draw(st.none() | st.integers(1, 200))
    softcap = data.draw(st.none() | st.floats(0.5, 50))
    options = (SCALE, window, softcap, *quantize(batch, data.draw(st.sampled_from([None, *QUANTIZED]))))
    assert rel_rms(came_of(batch, *options), wanted_of(batch, *options)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cache_dtype", QUANTIZED)
@pytest.mark.parametrize("window", [None, 100])
def test_quantized_caches(
    window: int | None,
    cache_dtype: torch.dtype,
    dtype: torch.dtype,
    make_batch: Any,
    rel_rms: Callable[[Tensor, Tensor], float],
) -> None:
    """Against the reference on the same caches; and near what the caches were before."""
    lengths = RAGGED["decodes and chunks mixed"]
    batch = make_batch(*lengths, dims=(80, 64), dtype=dtype)
    exact = wanted_of(batch, SCALE, window)
    scales = quantize(batch, cache_dtype)
    came = came_of(batch, SCALE, window, None, *scales)
    assert came.dtype == dtype
    assert rel_rms(came, wanted_of(batch, SCALE, window, None, *scales)) < TOLERANCE[dtype]
    assert rel_rms(came, exact) < (0.04 if cache_dtype == torch.int8 else 0.08)


def test_nothing_to_do(make_batch: Any) -> None:
    batch = make_batch([], [], dims=(64, 40))
    assert came_of(batch).shape == (0, 9, 40)


def test_queries_that_lie_apart(make_batch: Any) -> None:
    batch = make_batch([1, 5], [20, 33])
    contiguous = came_of(batch)
    batch.q = torch.cat((batch.q, batch.q), 1)[:, :9]
    assert torch.equal(came_of(batch), contiguous)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, *QUANTIZED])
def test_what_lies_beyond_the_context_has_no_effect(cache_dtype: torch.dtype, make_batch: Any) -> None:
    """The rest of a last block, and blocks of others, may hold the largest of finite numbers."""
    query_lens, context_lens = RAGGED["decodes and chunks mixed"]
    quantized = cache_dtype in QUANTIZED
    batch = make_batch(query_lens, context_lens, dtype=torch.float32 if quantized else cache_dtype)
    options = (SCALE, None, None, *quantize(batch, cache_dtype if quantized else None))
    before = came_of(batch, *options)
    used = torch.zeros(batch.k_cache.shape[:2], dtype=torch.bool)
    for table, length in zip(batch.meta.block_tables, context_lens, strict=True):
        positions = torch.arange(length)
        used[table[positions // 16], positions % 16] = True
    assert not used.all()
    most = 127 if cache_dtype == torch.int8 else torch.finfo(cache_dtype).max
    # torch indexes no float8.
    for cache, number in ((batch.k_cache, most if quantized else 1e25), (batch.v_cache, most)):
        integers = cache.view(getattr(torch, f"int{8 * cache.element_size()}"))
        integers[~used] = torch.tensor(number).to(cache_dtype).view(integers.dtype)
    assert torch.equal(came_of(batch, *options), before)


KINDS: list[dict[str, Any]] = [
    {},
    {"heads": (4, 4), "dims": (128, 128)},
    {"heads": (16, 2), "dims": (128, 64), "block_size": 32},
    {"heads": (5, 1), "dims": (80, 80), "block_size": 256},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "length", "window", "softcap", "cache_dtype"),
    [
        *((kind, 400, None, None, None) for kind in KINDS),
        *((kind, 400, 150, None, None) for kind in KINDS),
        ({"heads": (3, 1), "dims": (32, 32)}, 2500, None, None, None),
        ({"heads": (3, 1), "dims": (32, 32)}, 2500, 2200, None, None),
        ({}, 400, None, 3.0, None),
        *((KINDS[-1], 400, None, None, cache_dtype) for cache_dtype in QUANTIZED),
    ],
)
def test_a_token_is_the_same_however_its_prompt_was_cut(
    kind: dict[str, Any],
    length: int,
    window: int | None,
    softcap: float | None,
    cache_dtype: torch.dtype | None,
    dtype: torch.dtype,
    make_batch: Any,
) -> None:
    """Whole, in chunks of any length, or token by token; to the last bit."""
    whole = make_batch([length], [length], dtype=dtype, **kind)
    options = (SCALE, window, softcap, *quantize(whole, cache_dtype))
    wanted = came_of(whole, *options)
    table = whole.meta.block_tables.tolist()
    bounds = [(0, 1), (0, 3), (1, 64), (63, 130), (127, 128), (128, 300), (300, 301)]
    for first, last in [
        *bounds,
        (length - 260, length - 100),
        (length - 2, length - 1),
        (length - 1, length),
    ]:
        meta = AttentionMetadata.build([last - first], [last], table, whole.meta.block_size, "cpu")
        q = whole.q[first:last].clone()
        came = ops.paged_attention(q, whole.cache(*options[3:]), meta, *options[:3])
        assert torch.equal(came, wanted[first:last]), (first, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "cache_dtype"),
    [*((kind, None) for kind in KINDS), *((KINDS[0], cache_dtype) for cache_dtype in QUANTIZED)],
)
def test_a_sequence_is_the_same_in_any_batch(
    kind: dict[str, Any], cache_dtype: torch.dtype | None, dtype: torch.dtype, make_batch: Any
) -> None:
    query_lens = [1, 1, 5, 1, 64, 1, 1, 100, 2, 1]
    context_lens = [16, 220, 33, 600, 64, 1, 1500, 300, 129, 128]
    batch = make_batch(query_lens, context_lens, dtype=dtype, **kind)
    options = (SCALE, None, None, *quantize(batch, cache_dtype))
    wanted = came_of(batch, *options)
    start = batch.meta.query_start.tolist()
    for i, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        table = batch.meta.block_tables[i].tolist()
        alone = AttentionMetadata.build([query_len], [context_len], [table], batch.meta.block_size, "cpu")
        rows = slice(start[i], start[i + 1])
        came = ops.paged_attention(batch.q[rows], batch.cache(*options[3:]), alone, *options[:3])
        assert torch.equal(came, wanted[rows]), i


@given(data=st.data(), block_size=st.sampled_from([1, 3, 16, 130]))
@settings(max_examples=40, deadline=None)
def test_metadata_says_where_each_token_stands(data: st.DataObject, block_size: int) -> None:
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 300)), max_size=8))
    query_lens = [query for query, _ in lengths]
    context_lens = [query + before for query, before in lengths]
    tables = [[100 * i + j for j in range(-(-c // block_size) + i % 2)] for i, c in enumerate(context_lens)]
    meta = AttentionMetadata.build(query_lens, context_lens, tables, block_size, "cpu")
    positions = [p for q, c in zip(query_lens, context_lens, strict=True) for p in range(c - q, c)]
    owners = [i for i, q in enumerate(query_lens) for _ in range(q)]
    assert meta.positions.tolist() == positions
    assert meta.slot_mapping.tolist() == [
        tables[i][p // block_size] * block_size + p % block_size
        for i, p in zip(owners, positions, strict=True)
    ]


@pytest.mark.parametrize(
    ("query_lens", "context_lens", "tables"),
    [([0], [1], [[1]]), ([2], [1], [[1]]), ([1], [17], [[1]]), ([1], [1], []), ([1, 1], [1], [[1]])],
)
def test_metadata_refuses_what_cannot_be(
    query_lens: list[int], context_lens: list[int], tables: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match="query_len"):
        AttentionMetadata.build(query_lens, context_lens, tables, 16, "cpu")
