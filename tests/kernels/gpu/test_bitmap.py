"""The Triton kernels of unstructured sparse weights, interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.kernels.gpu.conftest import TOLERANCE, CheckCandidates, CheckProduct
from torch import Tensor

from fastserve_kernels.formats.quantized import Int8
from fastserve_kernels.formats.sparse import Bitmap
from fastserve_kernels.gpu import bitmap
from fastserve_kernels.gpu.launch import launch_all

pytestmark = pytest.mark.usefixtures("poisoned")

RelRms = Callable[[Tensor, Tensor], float]
Product = Callable[..., Tensor]

(OPERATOR,) = bitmap.OPERATORS


def uneven(n: int, k: int, dtype: torch.dtype) -> Bitmap:
    """The first row empty, the second full, then from few to many."""
    kept = torch.rand(n, k) < torch.linspace(0.002, 1, n)[:, None]
    kept[0], kept[1] = False, True
    return Bitmap.pack(torch.randn(n, k).to(dtype), mask=kept)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 64])
def test_equals_the_float32_product(tokens: int, dtype: torch.dtype, check_product: CheckProduct) -> None:
    weight = uneven(19, 301, dtype)
    x, bias, residual = (torch.randn(size).to(dtype) for size in ((tokens, 301), (19,), (tokens, 19)))
    check_product(weight, x, bias, residual)


@pytest.mark.parametrize("columns", [1, 31, 2048, 2053, 4100])
def test_columns_around_a_segment(columns: int, check_product: CheckProduct) -> None:
    weight, x = uneven(9, columns, torch.float16), torch.randn(1, columns).half()
    check_product(weight, x)


def test_numbers_far_apart(check_product: CheckProduct) -> None:
    dense = torch.zeros(12, 200)
    for row in range(12):
        dense[row, :: row + 1] = torch.randn(-(-200 // (row + 1)))
    weight, x = Bitmap.pack(dense), torch.randn(1, 200)
    check_product(weight, x)


def test_a_weight_of_zeros(product: Product) -> None:
    weight, bias = Bitmap.pack(torch.zeros(8, 40)), torch.randn(8)
    for tokens in (1, 8):
        assert torch.equal(product(weight, torch.randn(tokens, 40), bias), bias.expand(tokens, 8))


def test_x_that_is_not_contiguous(check_product: CheckProduct) -> None:
    weight, x = uneven(8, 64, torch.bfloat16), torch.randn(64, 3).bfloat16().t()
    check_product(weight, x)


def test_no_tokens(product: Product) -> None:
    weight = uneven(8, 64, torch.float16)
    assert product(weight, torch.empty(0, 64).half()).shape == (0, 8)


@pytest.mark.parametrize("tokens", [1, 2, 4, 9, 70])
def test_every_candidate(tokens: int, check_candidates: CheckCandidates) -> None:
    check_candidates(OPERATOR, {"m": tokens, "n": 20, "k": 300, "percent": 50})


def test_segments_are_split_between_programs(device: torch.device, rel_rms: RelRms) -> None:
    shape = {"m": 1, "n": 5, "k": 6000, "percent": 40}
    *inputs, out = OPERATOR.inputs(shape, torch.float16, device)
    assert OPERATOR.reference is not None
    config = OPERATOR.candidates(shape)[0]
    assert config.constants["SPLITS"] == 2
    launch_all(OPERATOR.plan(*inputs, out, config=config))
    assert rel_rms(out, OPERATOR.reference(*inputs, out)) < TOLERANCE[torch.float16]


def test_bytes_per_weight_at_half_density(device: torch.device) -> None:
    weight = Bitmap.pack(torch.randn(64, 4096).half(), density=0.5)
    values, records, lists, _ = bitmap.prepare(weight, device, torch.float16).arguments
    assert isinstance(values, Tensor)
    assert isinstance(records, Tensor)
    assert isinstance(lists, Tensor)
    assert (values.nbytes + lists.nbytes) / (64 * 4096) < 1.275
    assert (values.nbytes + records.nbytes) / (64 * 4096) < 1.275


def test_cost_counts_the_bytes_of_the_format() -> None:
    weight = Bitmap.pack(torch.randn(64, 128).half(), density=0.5)
    held = weight.values.nbytes + weight.mask.nbytes
    cost = OPERATOR.cost({"m": 3, "n": 64, "k": 128, "percent": 50}, torch.float16)
    assert cost.bytes == held + 2 * 3 * (64 + 128)


def test_refuses_another_format(device: torch.device) -> None:
    with pytest.raises(ValueError, match="must be Bitmap, not Int8"):
        bitmap.prepare(Int8.pack(torch.randn(8, 32)), device, torch.float16)
