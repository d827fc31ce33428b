"""The Triton kernel of block-sparse weights, interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.kernels.gpu.conftest import TOLERANCE, CheckCandidates, CheckProduct
from torch import Tensor

from fastserve_kernels.formats.quantized import Int8
from fastserve_kernels.formats.sparse import BlockSparse
from fastserve_kernels.gpu import block_sparse

pytestmark = pytest.mark.usefixtures("poisoned")

Product = Callable[..., Tensor]

(OPERATOR,) = block_sparse.OPERATORS


def uneven(rows: int, columns: int, block_shape: tuple[int, int], dtype: torch.dtype) -> BlockSparse:
    """So many block rows and block columns: the first row empty, the second full, the others in between."""
    kept = torch.rand(rows, columns) < 0.4
    kept[0], kept[1] = False, True
    mask = kept.repeat_interleave(block_shape[0], 0).repeat_interleave(block_shape[1], 1)
    return BlockSparse.pack((torch.randn(mask.shape) * mask).to(dtype), block_shape)


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small test weights are cut into runs too."""
    monkeypatch.setattr(block_sparse, "_LEAST_RUN", 1)


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 64])
def test_equals_the_float32_product(tokens: int, dtype: torch.dtype, check_product: CheckProduct) -> None:
    weight = uneven(3, 5, (16, 32), dtype)
    x, bias, residual = (torch.randn(size).to(dtype) for size in ((tokens, 160), (48,), (tokens, 48)))
    check_product(weight, x, bias, residual)


@pytest.mark.parametrize("block_shape", [(16, 16), (16, 128), (32, 64), (64, 16), (128, 128)])
def test_block_shapes(block_shape: tuple[int, int], check_product: CheckProduct) -> None:
    weight, x = uneven(3, 5, block_shape, torch.float16), torch.randn(3, 5 * block_shape[1]).half()
    check_product(weight, x)


def test_a_weight_of_no_block(product: Product) -> None:
    weight = BlockSparse.pack(torch.zeros(32, 32), (16, 16))
    bias = torch.randn(32)
    assert torch.equal(product(weight, torch.randn(2, 32), bias), bias.expand(2, 32))


def test_x_that_is_not_contiguous(check_product: CheckProduct) -> None:
    weight, x = uneven(2, 4, (16, 16), torch.bfloat16), torch.randn(64, 3).bfloat16().t()
    check_product(weight, x)


def test_no_tokens(product: Product) -> None:
    weight = uneven(2, 2, (16, 16), torch.float16)
    assert product(weight, torch.empty(0, 32).half()).shape == (0, 32)


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("tokens", [1, 9, 40, 70])
@pytest.mark.parametrize("block_n", [16, 64])
def test_every_candidate(block_n: int, tokens: int, check_candidates: CheckCandidates) -> None:
    shape = {"m": tokens, "n": 2 * block_n, "k": 192, "block_n": block_n, "block_k": 16, "percent": 50}
    check_candidates(OPERATOR, shape)


@pytest.mark.parametrize("length", [1, 2, 3, 100])
def test_runs_cover_each_block_once_and_are_even(length: int) -> None:
    starts = torch.tensor([0, 0, 7, 8, 20])
    runs = block_sparse._runs(starts, length)
    lengths = runs[:, 2] - runs[:, 1]
    assert lengths.max() <= length
    for row in range(4):
        ours = runs[runs[:, 0] == row]
        covered = [block for first, end in ours[:, 1:3].tolist() for block in range(first, end)]
        assert covered == list(range(int(starts[row]), int(starts[row + 1])))
        assert ours[:, 3].tolist() == list(range(len(ours)))
        assert set(ours[:, 4].tolist()) == {len(ours)}
        assert lengths[runs[:, 0] == row].max() - lengths[runs[:, 0] == row].min() <= 1


def test_cuts_rows_where_they_are_few(device: torch.device) -> None:
    weight = BlockSparse.pack(torch.randn(64, 16384), (64, 64), 0.5)
    runs = block_sparse.prepare(weight, device, torch.float16).arguments[1]
    assert isinstance(runs, Tensor)
    assert len(runs) == 1 + 64  # the whole row; then runs of two blocks, 8192 numbers


def test_cost_counts_the_bytes_of_the_blocks() -> None:
    weight = BlockSparse.pack(torch.randn(64, 128).half(), (16, 16), 0.5)
    shape = {"m": 3, "n": 64, "k": 128, "block_n": 16, "block_k": 16, "percent": 50}
    blocks = weight.blocks.nbytes + weight.columns.nbytes
    assert OPERATOR.cost(shape, torch.float16).bytes == blocks + 2 * 3 * (64 + 128)


def test_refuses_another_format(device: torch.device) -> None:
    with pytest.raises(ValueError, match="must be BlockSparse, not Int8"):
        block_sparse.prepare(Int8.pack(torch.randn(8, 32)), device, torch.float16)
