"""The Triton kernel of rotary embedding and of writing to the cache against `reference`: equal to the bit.

Interpreted where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.gpu import kv_write
from fastserve_kernels.kv_cache import KVCache

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Step:
    """A step's queries, keys and values, as views of one tensor, and where they go."""

    def __init__(self, tokens: int, dtype: torch.dtype, rotary_dim: int = 64, dim_v: int = 40) -> None:
        self.q, self.k, _ = torch.randn(tokens, 9 + 3 + 3, 64).to(dtype).split([9, 3, 3], dim=1)
        self.v = torch.randn(tokens, 3, dim_v + 8).to(dtype)[..., :dim_v]
        self.cos, self.sin = torch.randn(2, tokens, rotary_dim).to(dtype)
        self.slot_mapping = torch.randperm(6 * 4)[:tokens]

    def caches(self, stored: torch.dtype) -> tuple[Tensor, Tensor]:
        """A cache in blocks of 4, full of ones."""
        return torch.ones(6, 4, 3, 64).to(stored), torch.ones(6, 4, 3, self.v.shape[2]).to(stored)

    def reference(self, cache: KVCache) -> Tensor:
        """The rotated queries; the keys and values are in the cache then."""
        return reference.rotary_write_kv(self.q, self.k, self.v, self.cos, self.sin, cache, self.slot_mapping)

    def moved(self, device: torch.device) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in vars(self).items()}


def equal(came: Tensor, wanted: Tensor) -> bool:
    """To the bit, but for float32, where a GPU rounds a product and a sum once."""
    if came.dtype == torch.float32:
        return torch.allclose(came.cpu(), wanted, rtol=1e-6, atol=1e-6)
    return torch.equal(came.cpu().float(), wanted.float())


def equal_caches(came: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(equal(a, b) for a, b in zip(came, wanted, strict=True))


def write(
    step: Step, caches: tuple[Tensor, Tensor], scales: Any, device: torch.device
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(rotated queries, caches) of the kernel; in memory other layers lie between the caches' blocks."""
    keys, values = (torch.stack((cache, cache), 1).to(device)[:, 1] for cache in caches)
    cache = KVCache(keys, values, *(scale if scale is None else scale.to(device) for scale in scales))
    q = kv_write.rotary_write_kv(**step.moved(device), cache=cache)
    return q.cpu(), (keys, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [64, 32, 2])
@pytest.mark.parametrize("tokens", [0, 7])
def test_rotary(tokens: int, rotary_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    step = Step(tokens, dtype, rotary_dim)
    tensors = step.moved(device)
    came = kv_write.rotary(*(tensors[name] for name in ("q", "k", "cos", "sin")))
    for a, b in zip(came, reference.rotary(step.q, step.k, step.cos, step.sin), strict=True):
        assert equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("tokens", [0, 5])
def test_rotary_write_kv(
    tokens: int, stored: torch.dtype | None, dtype: torch.dtype, device: torch.device
) -> None:
    step = Step(tokens, dtype)
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    if stored is not None:
        # So that some numbers are beyond the range, and some below the least normal one of float8.
        scales = torch.tensor([0.001, 0.02, 1.0]), torch.tensor([20.0, 0.02, 1.0])
    q, came = write(step, step.caches(stored or dtype), scales, device)
    wanted = step.caches(stored or dtype)
    wanted_q = step.reference(KVCache(*wanted, *scales))
    assert equal(q, wanted_q)
    assert equal_caches(came, wanted)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_write_kv_keeps_the_cache_finite(stored: torch.dtype, device: torch.device) -> None:
    step = Step(5, torch.bfloat16)
    for tensor in (step.k, step.v):
        tensor[1, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    scales = (None, None) if stored == torch.bfloat16 else (torch.rand(3) * 0.1, torch.rand(3) * 0.1)
    came = tuple(cache.to(device) for cache in step.caches(stored))
    cache = KVCache(*came, *(scale if scale is None else scale.to(device) for scale in scales))
    k, v, slots = step.k.to(device), step.v.to(device), step.slot_mapping.to(device)
    kv_write.write_kv(k, v, cache, slots)
    wanted = step.caches(stored)
    reference.write_kv(step.k, step.v, KVCache(*wanted, *scales), step.slot_mapping)
    assert equal_caches(came, wanted)
    assert all(cache.float().isfinite().all() for cache in came)


def test_rounding_to_eight_bits(device: torch.device) -> None:
    """Halves between two codes go to the even one, and what lies beyond the largest code becomes it."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = torch.cat(((codes[1:] + codes[:-1]) / 2, codes, torch.tensor([460.0, 1e30])))
    numbers = torch.cat((halves, -halves, torch.arange(-130.5, 131.0, 0.5)))
    x, slots, scale = numbers[None, None], torch.zeros(1, dtype=torch.int64), torch.ones(1)
    for stored in (torch.int8, torch.float8_e4m3fn):
        wanted_k, wanted_v = torch.zeros(2, 1, 1, 1, len(numbers)).to(stored)
        k_cache, v_cache = wanted_k.clone().to(device), wanted_v.clone().to(device)
        moved, one = x.to(device), scale.to(device)
        kv_write.write_kv(moved, moved, KVCache(k_cache, v_cache, one, one), slots.to(device))
        reference.write_kv(x, x, KVCache(wanted_k, wanted_v, scale, scale), slots)
        assert equal_caches((k_cache, v_cache), (wanted_k, wanted_v))


def test_every_config(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(3, torch.bfloat16)
    wanted = step.caches(torch.bfloat16)
    wanted_q = step.reference(KVCache(*wanted))
    for config in kv_write.candidates({}):
        monkeypatch.setattr(kv_write, "config_for", lambda *_, config=config: config)
        q, came = write(step, step.caches(torch.bfloat16), (None, None), device)
        assert torch.equal(q, wanted_q)
        assert equal_caches(came, wanted)
