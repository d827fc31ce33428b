"""Weights of 4 bits: `linear_int4` and `linear_nf4`, and what all formats of `quantized_linear` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastserve_kernels.formats import NF4, Int4, Weight
from fastserve_kernels.gpu.int4_linear import linear_int4
from fastserve_kernels.gpu.launch import Config
from fastserve_kernels.gpu.split_k import arrivals

Product = Callable[..., Tensor]
RelRms = Callable[[Tensor, Tensor], float]
BARS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
FEW = {"ROW_BLOCKS": 2, "BLOCK_M": 8, "K_WARPS": 4, "SPLITS": 1, "SCALED_WEIGHTS": 0}
MORE = {"ROW_BLOCKS": 4, "BLOCK_M": 32, "K_WARPS": 0, "SPLITS": 1, "SCALED_WEIGHTS": 0}


def int4(n: int, k: int, group_size: int, zeros: str = "none", scales: torch.dtype = torch.bfloat16) -> Int4:
    weight = Int4.pack(torch.randn(n, k), group_size, symmetric=zeros == "none", scale_dtype=scales)
    if zeros == "fractional":
        assert weight.zeros is not None
        weight = dataclasses.replace(weight, zeros=weight.zeros + torch.rand_like(weight.zeros) - 0.5)
    return weight


def expected(weight: Weight, x: Tensor, *added: Tensor) -> Tensor:
    return sum((t.float() for t in added), x.float() @ weight.dequantize().T)


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("m", [1, 2, 3, 16, 17, 64])
def test_any_number_of_tokens(
    product: Product, rel_rms: RelRms, poison: None, m: int, dtype: torch.dtype
) -> None:
    weight, x = int4(51, 192, 64), torch.randn(m, 192).to(dtype)
    bias, residual = torch.randn(51).to(dtype), torch.randn(m, 51).to(dtype)
    y = product(weight, x, bias, residual)
    assert y.dtype == dtype
    assert rel_rms(y, expected(weight, x, bias, residual)) < BARS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeros", ["none", "whole", "fractional"])
@pytest.mark.parametrize(("k", "group_size"), [(288, 32), (192, 64), (384, 128), (100, 100)])
def test_groups_and_zeros(
    product: Product, rel_rms: RelRms, k: int, group_size: int, zeros: str, dtype: torch.dtype
) -> None:
    for m in (3, 20):
        weight, x = int4(20, k, group_size, zeros, torch.float32), torch.randn(m, k).to(dtype)
        assert rel_rms(product(weight, x), expected(weight, x)) < BARS[dtype]


def test_scales_too_small_for_float16(product: Product, rel_rms: RelRms) -> None:
    weight = int4(20, 128, 64, scales=torch.float32)
    weight = dataclasses.replace(weight, scales=weight.scales * 1e-6)
    x = torch.randn(3, 128).bfloat16()
    assert rel_rms(product(weight, x), expected(weight, x)) < BARS[torch.bfloat16]


def test_zeros_far_from_the_codes(product: Product, rel_rms: RelRms) -> None:
    weight = int4(20, 128, 64, "whole")
    assert weight.zeros is not None
    weight = dataclasses.replace(weight, zeros=weight.zeros - 70)
    x = torch.randn(3, 128).bfloat16()
    assert rel_rms(product(weight, x), expected(weight, x)) < BARS[torch.bfloat16]


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (192, 64), (96, 96)])
def test_nf4(product: Product, rel_rms: RelRms, k: int, group_size: int, dtype: torch.dtype) -> None:
    weight = NF4.pack(torch.randn(35, k), group_size, torch.randn(16))
    for m in (2, 20):
        x, bias = torch.randn(m, k).to(dtype), torch.randn(35).to(dtype)
        assert rel_rms(product(weight, x, bias), expected(weight, x, bias)) < BARS[dtype]


def test_strided_operands(product: Product, rel_rms: RelRms) -> None:
    weight = int4(20, 64, 32)
    bias = torch.randn(40)[::2]
    for x in (torch.randn(6, 100)[::2, 7:71], torch.randn(64, 3).T):
        residual = torch.randn(20, 3).T
        came = product(weight, x, bias, residual)
        assert rel_rms(came, expected(weight, x, bias, residual)) < BARS[torch.float32]


def test_no_tokens(product: Product) -> None:
    assert product(int4(20, 64, 32), torch.randn(0, 64)).shape == (0, 20)


def test_columns_that_do_not_match(product: Product) -> None:
    with pytest.raises(ValueError, match="x has 300 columns"):
        product(int4(20, 64, 32), torch.randn(2, 300))


def planned(weight: Int4, x: Tensor, config: Config, device: torch.device) -> Tensor:
    """By a config, into an output full of NaN."""
    prepared = linear_int4.prepare(weight, device, x.dtype)
    y = torch.full((x.shape[0], weight.out_features), float("nan"), dtype=x.dtype, device=device)
    for launch in linear_int4.entry.plan(x.to(device), prepared.arguments, (None, None), y, config=config):
        launch.run()
    return y.cpu()


def distinct(configs: list[Config]) -> list[Config]:
    """The first of those that differ only in warps and stages, which the interpreter does not have."""
    return list({tuple(config.constants.items()): config for config in reversed(configs)}.values())


@pytest.mark.parametrize("m", [1, 12, 24, 65])
def test_every_candidate(device: torch.device, rel_rms: RelRms, m: int) -> None:
    weight, x = int4(40, 640, 128, "fractional"), torch.randn(m, 640).bfloat16()
    candidates = linear_int4.entry.candidates({"m": m, "n": 40, "k": 640, "group_size": 128})
    assert 1 <= len(candidates) <= 24
    for config in distinct(candidates)[:: 1 if m < 24 else 4]:
        assert rel_rms(planned(weight, x, config, device), expected(weight, x)) < BARS[torch.bfloat16], config


@pytest.mark.parametrize("shape", [(1, 4096, 4096), (8, 40, 64), (33, 28672, 4096), (2048, 576, 1536)])
def test_candidates_of_any_shape(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for group_size in (32, k):
        candidates = linear_int4.entry.candidates(
            {"m": m, "n": n, "k": k, "group_size": group_size, "zeros": 0}
        )
        assert 1 <= len(candidates) <= 24


@pytest.mark.parametrize("sizes", [FEW, MORE])
@pytest.mark.parametrize("splits", [2, 4])
def test_programs_that_share_k(
    device: torch.device, rel_rms: RelRms, poisoned: None, sizes: dict[str, int], splits: int
) -> None:
    """Twice: the second launch finds the counts as the first one left them."""
    weight, x = int4(40, 1152, 128), torch.randn(5, 1152)
    config = Config({**sizes, "SPLITS": splits})
    for dtype in (torch.bfloat16, torch.float16):
        first, second = (planned(weight, x.to(dtype), config, device) for _ in range(2))
        assert rel_rms(first, expected(weight, x.to(dtype))) < BARS[dtype]
        assert torch.equal(first, second)
    assert not arrivals(device).any()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_scaled_weights(device: torch.device, rel_rms: RelRms, group_size: int) -> None:
    weight, x = int4(40, 256, group_size, "whole"), torch.randn(9, 256).bfloat16()
    config = Config({**MORE, "SCALED_WEIGHTS": 1})
    assert rel_rms(planned(weight, x, config, device), expected(weight, x)) < BARS[torch.bfloat16]


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"linear_int4 needs .* 8.0 or higher; Tesla T4 has 7.5"):
        linear_int4.prepare(int4(16, 64, 32), torch.device("cuda"), torch.bfloat16)
