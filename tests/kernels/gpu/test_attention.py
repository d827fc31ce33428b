"""Paged attention's Triton kernels against `reference`, interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.gpu import attention
from fastserve_kernels.gpu.launch import Config
from fastserve_kernels.kv_cache import KVCache

pytestmark = pytest.mark.usefixtures("poisoned")

RelRms = Callable[[Tensor, Tensor], float]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
SCALE = 0.125

MIXED = ([1, 3, 70, 20], [150, 33, 70, 91])
"""Decodes, drafted tokens, a prompt and a later chunk."""
HEADS = (6, 2)
"""Few: the interpreter is slow, and one key head after another is the same to it."""


@pytest.fixture
def mixed(make_batch: Any) -> Callable[..., Any]:
    """A batch of all sorts of sequences on the CPU."""
    return lambda heads=HEADS, **kind: make_batch(*MIXED, heads=heads, **kind)


def scales_of(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Scales for caches that need them."""
    if batch.k_cache.dtype not in (torch.int8, torch.float8_e4m3fn):
        return None, None
    heads = batch.k_cache.shape[2]
    return torch.rand(heads) * 0.03 + 0.01, torch.rand(heads) * 0.03 + 0.01


def came_of(
    batch: Any,
    device: torch.device,
    window: int | None = None,
    softcap: float | None = None,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    on_device = (scale if scale is None else scale.to(device) for scale in scales)
    cache = KVCache(batch.k_cache.to(device), batch.v_cache.to(device), *on_device)
    layout = tuple(tensor.to(device) for tensor in batch.layout)
    return attention.paged_attention(batch.q.to(device), cache, layout, SCALE, window, softcap).cpu()


def wanted_of(
    batch: Any,
    window: int | None = None,
    softcap: float | None = None,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    return reference.paged_attention(
        batch.q.float(), batch.cache(*scales), batch.layout, SCALE, window, softcap
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_reference(
    dtype: torch.dtype, mixed: Callable[..., Any], rel_rms: RelRms, device: torch.device
) -> None:
    batch = mixed(dtype=dtype)
    came = came_of(batch, device)
    assert came.dtype == dtype
    assert rel_rms(came, wanted_of(batch)) < TOLERANCE[dtype]


def test_decodes_around_the_bounds_of_blocks_and_tiles(
    make_batch: Any, rel_rms: RelRms, device: torch.device
) -> None:
    lengths = [1, 15, 16, 17, 63, 64, 65, 128]
    batch = make_batch([1] * len(lengths), lengths, heads=HEADS, dtype=torch.float16)
    assert rel_rms(came_of(batch, device), wanted_of(batch)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("heads", "dims", "block_size"),
    [
        ((4, 4), (80, 96), 8),
        ((8, 1), (128, 64), 128),
        ((4, 2), (256, 256), 32),
        ((20, 1), (24, 40), 7),
        ((3, 1), (64, 64), 200),
    ],
)
def test_equals_the_reference_for_every_kind_of_model(
    heads: tuple[int, int],
    dims: tuple[int, int],
    block_size: int,
    mixed: Callable[..., Any],
    rel_rms: RelRms,
    device: torch.device,
) -> None:
    batch = mixed(heads=heads, dims=dims, block_size=block_size, dtype=torch.bfloat16)
    assert rel_rms(came_of(batch, device), wanted_of(batch)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("window", "softcap", "dtype"),
    [
        (1, None, torch.bfloat16),
        (16, 2.0, torch.float32),
        (70, None, torch.bfloat16),
        (None, 2.0, torch.bfloat16),
    ],
)
def test_sliding_windows_and_soft_caps(
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    mixed: Callable[..., Any],
    rel_rms: RelRms,
    device: torch.device,
) -> None:
    batch = mixed(dtype=dtype)
    came = came_of(batch, device, window, softcap)
    assert rel_rms(came, wanted_of(batch, window, softcap)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.int8, torch.bfloat16),
        (torch.int8, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float16),
    ],
)
def test_caches_of_eight_bits(
    stored: torch.dtype,
    dtype: torch.dtype,
    mixed: Callable[..., Any],
    rel_rms: RelRms,
    device: torch.device,
) -> None:
    batch = mixed(dtype=dtype)
    batch.q[0] *= 1e-6
    for name in ("k_cache", "v_cache"):
        codes = getattr(batch, name).float() * 40
        setattr(batch, name, codes.round().clamp(-128, 127).to(stored))
    scales = scales_of(batch)
    came = came_of(batch, device, scales=scales)
    assert rel_rms(came, wanted_of(batch, scales=scales)) < TOLERANCE[dtype]


def test_every_code_of_float8(make_batch: Any, rel_rms: RelRms, device: torch.device) -> None:
    """Subnormal ones too. One key each, so that the result is the value."""
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    codes = finite.view(torch.float8_e4m3fn)
    batch = make_batch([1], [1], heads=(1, 1), dims=(64, 254))
    batch.k_cache = torch.zeros_like(batch.k_cache, dtype=torch.float8_e4m3fn)
    batch.v_cache = codes.expand(*batch.v_cache.shape[:3], 254).contiguous()
    came = came_of(batch, device, scales=(torch.ones(1), torch.ones(1)))
    assert torch.equal(came[0, 0], codes.float())


CONFIGS = {
    (operator.name, config.constants.get("BLOCK_M", 0), config.constants["BLOCK_N"]): config
    for operator in attention.OPERATORS
    for shape in operator.compiled_shapes
    for config in operator.candidates(shape)
}


@pytest.mark.parametrize("name", CONFIGS, ids=str)
def test_every_size_of_tile_that_may_be_tuned(
    name: tuple[str, int, int],
    make_batch: Any,
    rel_rms: RelRms,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = make_batch([1, 40, 1, 9], [20, 40, 150, 130], heads=(2, 1), dtype=torch.float16)

    def config_for(operator: Any, shape: Any, device: torch.device) -> Config:
        return CONFIGS[name] if operator.name == name[0] else operator.candidates(shape)[0]

    monkeypatch.setattr(attention, "config_for", config_for)
    assert rel_rms(came_of(batch, device), wanted_of(batch)) < TOLERANCE[torch.float16]


def test_the_number_of_programs_does_not_matter(
    make_batch: Any, rel_rms: RelRms, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one that does all to more than there are tiles of keys, of sequences that are one each."""
    batch = make_batch([1] * 4, [200, 1, 129, 64], heads=HEADS, dtype=torch.float16)
    for multiprocessors in (1, 3, 50):
        monkeypatch.setattr(attention, "multiprocessors", lambda _, count=multiprocessors: count)
        assert rel_rms(came_of(batch, device), wanted_of(batch)) < TOLERANCE[torch.float16]


def test_the_grid_follows_from_shapes_alone(make_batch: Any) -> None:
    """So that a CUDA graph serves all lengths."""
    grids = []
    for context_lens in ([200, 200], [1, 17]):
        batch = make_batch([1, 1], [200, 200], dtype=torch.float16)
        batch.meta = replace(batch.meta, context_lens=torch.tensor(context_lens))
        inputs = (batch.q, batch.cache(), batch.layout, SCALE, None, None, torch.empty_like(batch.q))
        for operator in attention.OPERATORS:
            config = operator.candidates(operator.compiled_shapes[0])[0]
            grids.append([launch.grid for launch in operator.plan(*inputs, config=config)])
    assert grids[:2] == grids[2:]


def test_strided_queries_and_caches(make_batch: Any, device: torch.device) -> None:
    batch = make_batch([1, 20], [30, 40], heads=HEADS, dtype=torch.bfloat16)
    contiguous = came_of(batch, device)
    batch.q = torch.cat((batch.q, batch.q), 1)[:, :6]
    both = torch.stack((batch.k_cache, batch.v_cache), 1)
    batch.k_cache, batch.v_cache = both[:, 0], both[:, 1]
    assert torch.equal(came_of(batch, device), contiguous)


def test_a_batch_that_does_not_fill_its_tensors(
    make_batch: Any, device: torch.device, rel_rms: RelRms
) -> None:
    """A batch as in a CUDA graph that was captured for more tokens, and for wider block tables."""
    batch = make_batch([1, 20, 1], [30, 64, 5], heads=HEADS, dtype=torch.float16)
    wanted = wanted_of(batch)
    batch.q = torch.cat((batch.q, torch.full_like(batch.q, float("nan"))))
    batch.meta = replace(batch.meta, block_tables=torch.nn.functional.pad(batch.meta.block_tables, (0, 90)))
    assert rel_rms(came_of(batch, device)[:22], wanted) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_what_lies_beyond_the_context_is_not_read(
    dtype: torch.dtype, make_batch: Any, device: torch.device
) -> None:
    batch = make_batch([1, 20], [90, 41], heads=HEADS, dtype=torch.float16)
    batch.k_cache, batch.v_cache = ((cache * 20).to(dtype) for cache in (batch.k_cache, batch.v_cache))
    scales = scales_of(batch)
    before = came_of(batch, device, scales=scales)
    used = torch.zeros(batch.k_cache.shape[:2], dtype=torch.bool)
    for table, length in zip(batch.meta.block_tables, batch.meta.context_lens.tolist(), strict=True):
        positions = torch.arange(length)
        used[table[positions // 16], positions % 16] = True
    worst = float("nan") if dtype.is_floating_point else 127
    batch.k_cache[~used], batch.v_cache[~used] = worst, worst
    assert torch.equal(came_of(batch, device, scales=scales), before)


def test_nothing_to_do(make_batch: Any, device: torch.device) -> None:
    assert came_of(make_batch([], [], dims=(64, 40)), device).shape == (0, 9, 40)


def test_refuses_what_the_kernels_do_not_take(make_batch: Any, device: torch.device) -> None:
    batch = make_batch([1], [5])
    with pytest.raises(ValueError, match=r"v_cache is torch\.float32 and v_scale given"):
        came_of(batch, device, scales=(None, torch.ones(3)))
    batch.k_cache = batch.k_cache.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="k_cache: the elements of a head lie 3 apart"):
        came_of(batch, device)
