"""NF4 and k-means."""

from __future__ import annotations

import torch
from tests.compression.conftest import RunStep

from fastserve.compression.quantization.codebooks import Codebook, k_means
from fastserve.compression.state.source_state import SourceState
from fastserve_kernels.formats import NF4, NORMAL_FLOAT_4


def test_sixteen_values_are_found_again() -> None:
    torch.manual_seed(0)
    values = torch.randn(16).sort().values
    weight = values[torch.randint(16, (32, 64))]
    packed = k_means(weight, 64, torch.ones(64), torch.float32)
    assert float((packed.dequantize() - weight).norm() / weight.norm()) < 0.05


def test_k_means_costs_less_than_nf4_what_it_is_told_to_cost() -> None:
    torch.manual_seed(0)
    weight, costs = torch.randn(64, 128) ** 3, torch.rand(128) ** 4
    mine, plain = k_means(weight, 64, costs, torch.float32), NF4.pack(weight, 64)

    def error(packed: NF4) -> float:
        return float(((packed.dequantize() - weight).square() * costs).sum())

    assert error(mine) < 0.8 * error(plain)


def test_a_weight_of_zeros_stays_zero() -> None:
    assert not k_means(torch.zeros(4, 32), 32, torch.ones(32), torch.float32).dequantize().any()


def test_the_steps_codebooks(source: SourceState, run_step: RunStep) -> None:
    plain = run_step(Codebook(group_size=32), source, "nf4").linears(0)
    own = run_step(Codebook(codebook="k-means", group_size=32), source, "own").linears(0)
    for name, weight in source.linears(0).items():
        nf4, ours = plain[name], own[name]
        assert isinstance(nf4, NF4)
        assert isinstance(ours, NF4)
        assert torch.equal(nf4.codebook, torch.tensor(NORMAL_FLOAT_4))
        assert not torch.equal(ours.codebook, nf4.codebook)
        dense = weight.dequantize()
        assert (ours.dequantize() - dense).norm() < (nf4.dequantize() - dense).norm() * 1.1
