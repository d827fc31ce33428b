"""int8 weights times activations rounded to int8: `linear_w8a8`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.formats import W8A8
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.gpu import w8a8
from fastserve_kernels.gpu.launch import Config
from fastserve_kernels.gpu.split_k import arrivals

Product = Callable[..., Tensor]
RelRms = Callable[[Tensor, Tensor], float]
BARS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def expected(weight: W8A8, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    added = (None if t is None else t.float() for t in (bias, residual))
    return reference.linear_w8a8(x.float(), (weight.values, weight.scales, weight.out_features), *added)


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("m", [1, 2, 3, 16, 17, 64])
@pytest.mark.parametrize("k", [128, 77])
def test_any_number_of_tokens(
    product: Product, rel_rms: RelRms, poison: None, m: int, k: int, dtype: torch.dtype
) -> None:
    weight, x = W8A8.pack(torch.randn(51, k)), torch.randn(m, k).to(dtype)
    bias, residual = torch.randn(51).to(dtype), torch.randn(m, 51).to(dtype)
    y = product(weight, x, bias, residual)
    assert rel_rms(y, expected(weight, x, bias, residual)) < BARS[dtype]


def test_activations_are_rounded_half_to_even(product: Product) -> None:
    """Whole numbers of steps, and halves between them: exact."""
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3.0]])
    weight = W8A8(torch.eye(8, dtype=torch.int8), torch.ones(8))
    assert product(weight, x).tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -126.0, 3.0]]


def test_tokens_of_zeros(product: Product) -> None:
    weight = W8A8.pack(torch.randn(20, 32))
    x = torch.randn(3, 32)
    x[1] = 0
    y = product(weight, x)
    assert torch.equal(y[1], torch.zeros(20))
    assert y[0].abs().sum() > 0


def test_more_columns_than_are_rounded_at_a_time(product: Product, rel_rms: RelRms) -> None:
    k = w8a8.BLOCK + 40
    weight, x = W8A8.pack(torch.randn(16, k)), torch.randn(2, k)
    x[0, -1], x[1, 0] = 9.0, -9.0
    assert rel_rms(product(weight, x), expected(weight, x)) < BARS[torch.float32]


def test_strided_operands(product: Product, rel_rms: RelRms) -> None:
    weight = W8A8.pack(torch.randn(20, 64))
    bias, residual = torch.randn(40)[::2], torch.randn(20, 3).T
    for x in (torch.randn(6, 100)[::2, 7:71], torch.randn(64, 3).T):
        came = product(weight, x, bias, residual)
        assert rel_rms(came, expected(weight, x, bias, residual)) < BARS[torch.float32]


def test_no_tokens(product: Product) -> None:
    assert product(W8A8.pack(torch.randn(20, 64)), torch.randn(0, 64)).shape == (0, 20)


def planned(x: Tensor, prepared: Prepared, config: Config) -> Tensor:
    """By a config, into an output full of NaN."""
    y = torch.full((x.shape[0], prepared.out_features), float("nan"), dtype=x.dtype, device=x.device)
    for launch in w8a8.W8A8_LINEAR.plan(x, prepared.arguments, (None, None), y, config=config):
        launch.run()
    return y.cpu()


@pytest.mark.parametrize("m", [1, 20, 100])
def test_every_candidate(device: torch.device, rel_rms: RelRms, poisoned: None, m: int) -> None:
    """Twice each: the second launch finds the counts as the first one left them."""
    weight, x = W8A8.pack(torch.randn(40, 1024)), torch.randn(m, 1024).to(device)
    prepared = w8a8.prepare(weight, device, x.dtype)
    candidates = w8a8.candidates({"m": m, "n": 40, "k": 1024})
    assert 1 <= len(candidates) <= 24
    distinct = {tuple(config.constants.items()): config for config in candidates}
    for config in list(distinct.values())[:: 1 if m < 20 else 2]:
        first, second = (planned(x, prepared, config) for _ in range(2))
        assert rel_rms(first, expected(weight, x.cpu())) < BARS[torch.float32], config
        assert torch.equal(first, second)
    assert not arrivals(device).any()
