"""The Triton kernel of low-rank weights, interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.kernels.gpu.conftest import TOLERANCE, CheckCandidates, CheckProduct
from torch import Tensor

from fastserve_kernels.formats import LowRank
from fastserve_kernels.formats.quantized import Int8
from fastserve_kernels.gpu import low_rank
from fastserve_kernels.gpu.launch import Config, Launch
from fastserve_kernels.gpu.split_k import arrivals

pytestmark = pytest.mark.usefixtures("poisoned")

Product = Callable[..., Tensor]

(OPERATOR,) = low_rank.OPERATORS


def factors(n: int, k: int, rank: int, dtype: torch.dtype) -> LowRank:
    return LowRank(torch.randn(rank, k).to(dtype), torch.randn(n, rank).to(dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 64])
def test_equals_the_float32_product(tokens: int, dtype: torch.dtype, check_product: CheckProduct) -> None:
    weight = factors(77, 301, 35, dtype)
    x, bias, residual = (torch.randn(size).to(dtype) for size in ((tokens, 301), (77,), (tokens, 77)))
    check_product(weight, x, bias, residual)


@pytest.mark.parametrize("rank", [1, 16, 130])
def test_ranks(rank: int, check_product: CheckProduct) -> None:
    weight, x = factors(33, 64, rank, torch.float16), torch.randn(3, 64).half()
    check_product(weight, x)


def test_x_that_is_not_contiguous(check_product: CheckProduct) -> None:
    weight, x = factors(16, 64, 16, torch.bfloat16), torch.randn(64, 3).bfloat16().t()
    check_product(weight, x)


def test_no_tokens(product: Product) -> None:
    assert product(factors(16, 64, 16, torch.float16), torch.empty(0, 64).half()).shape == (0, 16)


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_every_candidate(tokens: int, device: torch.device, check_candidates: CheckCandidates) -> None:
    def leaves_no_arrivals(config: Config, launches: list[Launch]) -> None:
        assert len(launches) == config.constants["LAUNCHES"]
        assert not arrivals(device).any()

    check_candidates(OPERATOR, {"m": tokens, "n": 70, "k": 300, "rank": 80}, leaves_no_arrivals)


def test_one_launch_for_few_tokens_and_two_for_many() -> None:
    shape = {"n": 4096, "k": 4096, "rank": 128}
    assert OPERATOR.candidates({"m": 1, **shape})[0].constants["LAUNCHES"] == 1
    assert OPERATOR.candidates({"m": 2048, **shape})[0].constants["LAUNCHES"] == 2


def test_the_makers_of_hidden_come_before_those_who_wait(device: torch.device) -> None:
    shape = {"m": 1, "n": 512, "k": 4096, "rank": 64}
    *inputs, out = OPERATOR.inputs(shape, torch.float16, device)
    config = OPERATOR.candidates(shape)[0]
    (launch,) = OPERATOR.plan(*inputs, out, config=config)
    rows, splits = config.constants["BLOCK_N"], config.constants["SPLITS"]
    assert splits > 1
    assert launch.grid == (-(-64 // rows) * splits + -(-512 // rows),)
    assert launch.arguments["first_program"] == 0


def test_cost_counts_the_bytes_of_the_factors() -> None:
    weight = factors(64, 128, 16, torch.float16)
    cost = OPERATOR.cost({"m": 3, "n": 64, "k": 128, "rank": 16}, torch.float16)
    assert cost.bytes == weight.nbytes + 2 * 3 * (64 + 128)


def test_refuses_another_format(device: torch.device) -> None:
    with pytest.raises(ValueError, match="must be LowRank, not Int8"):
        low_rank.prepare(Int8.pack(torch.randn(8, 32)), device, torch.float16)
