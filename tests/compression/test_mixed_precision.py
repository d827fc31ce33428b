"""Bits by sensitivity: the allocation, the estimate, and the step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compression.conftest import RunStep

from fastserve.compression.calibration.sensitivity import sensitivities
from fastserve.compression.errors import RecipeError
from fastserve.compression.quantization.gptq import Gptq
from fastserve.compression.quantization.mixed_precision import MixedPrecision, allocate
from fastserve.compression.state.model_state import SavedState
from fastserve.compression.state.source_state import SourceState
from fastserve.compression.step import Context
from fastserve_kernels.formats import Int4, Int8, IntRows
from fastserve_kernels.formats.compressed_tensors import bits_of

WIDTHS = (2, 3, 4, 6)


@settings(deadline=None)
@given(
    costs=st.lists(st.lists(st.floats(0, 100), min_size=4, max_size=4), min_size=4, max_size=4),
    sizes=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    bits=st.floats(2, 6),
)
def test_no_choice_that_needs_no_more_costs_less(
    costs: list[list[float]], sizes: list[int], bits: float
) -> None:
    found = allocated(costs, sizes, bits * sum(sizes))

    def spent(given: Sequence[int]) -> int:
        return sum(width * size for width, size in zip(given, sizes, strict=True))

    def cost(given: Sequence[int]) -> float:
        return sum(of_unit[WIDTHS.index(width)] for of_unit, width in zip(costs, given, strict=True))

    assert spent(found) <= bits * sum(sizes) * (1 + 1e-12)
    every = itertools.product(WIDTHS, repeat=4)
    least = min(cost(other) for other in every if spent(other) <= spent(found))
    assert cost(found) <= least + 1e-6


def allocated(costs: list[list[float]], sizes: list[int], budget: float) -> list[int]:
    units, size, widths = (torch.tensor(values, dtype=torch.float64) for values in (costs, sizes, WIDTHS))
    given: list[int] = allocate(units, size, widths, budget).tolist()
    return given


def test_most_of_the_budget_is_spent() -> None:
    """Where what another bit gains falls by as much for each."""
    factors = torch.rand(1000, generator=torch.Generator().manual_seed(0)).tolist()
    given = allocated(
        [[factor * 4.0**-bits for bits in WIDTHS] for factor in factors], [7] * 1000, 3.5 * 7000
    )
    assert 3.49 < sum(given) / 1000 <= 3.5
    assert [given[index] for index in sorted(range(1000), key=factors.__getitem__)] == sorted(given)


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="budget: got 19; allowed: at least 20"):
        allocated([[4.0, 3.0, 2.0, 1.0]], [10], 19)


def test_the_estimate_is_the_divergence(source: SourceState, context: Context, tmp_path: Path) -> None:
    """Of predictions, when random errors are added to all linears of a model."""
    found = [
        (f"model.layers.{index}.{name}", sensitivity)
        for index, of_layer in sensitivities(source, context.calibration, torch.device("cpu"), 0, tmp_path)
        for name, sensitivity in of_layer.items()
    ]
    model = source.transformers_model(torch.float32)
    with torch.no_grad():
        before = model(context.calibration).logits.log_softmax(-1)
        estimate = 0.0
        generator = torch.Generator().manual_seed(0)
        for name, sensitivity in found:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            change = 0.01 * torch.randn(weight.shape, generator=generator)
            weight += change
            estimate += float(((change @ sensitivity.hessian) * change).sum(1) @ sensitivity.rows) / 2
        after = model(context.calibration).logits.log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert divergence / 2 < estimate < divergence * 2


def test_rows_have_bits_of_their_own_and_the_budget_is_kept(source: SourceState, run_step: RunStep) -> None:
    after = run_step(MixedPrecision(bits=3.5, group_size=32), source)
    uniform = run_step(Gptq(bits=4, group_size=32), source, "uniform")
    stored, codes, widths = 0, 0, set()
    for index in range(3):
        for name, weight in after.linears(index).items():
            assert isinstance(weight, IntRows)
            widths |= set(weight.bits.tolist())
            stored += 8 * (weight.words.nbytes + weight.bits.nbytes)
            codes += weight.out_features * (weight.in_features + weight.scales.shape[1])
            assert output_error(after, index, name) < 4 * output_error(uniform, index, name)
    assert len(widths) > 2
    assert 3.45 * codes < stored < 3.52 * codes  # words that are not full, one for each width of a linear


def output_error(state: SavedState, index: int, name: str) -> float:
    reports = {report["name"]: report for report in state.notes[f"layer {index}"]}
    error: float = reports[f"model.layers.{index}.{name}"]["output_error"]
    return error


def test_linears_have_bits_of_their_own_in_formats_that_others_load(
    source: SourceState, run_step: RunStep
) -> None:
    after = run_step(MixedPrecision(bits=3.5, group_size=32, per="linear"), source)
    widths, spent, total = set(), 0, 0
    for index in range(3):
        for weight in after.linears(index).values():
            assert isinstance(weight, Int4 | Int8)
            bits = bits_of(weight)
            widths.add(bits)
            total += weight.out_features * weight.in_features
            spent += bits * weight.out_features * weight.in_features
    assert len(widths) > 1
    assert 3.2 * total < spent <= 3.5 * total


def test_an_average_beyond_the_widths_is_refused(source: SourceState) -> None:
    with pytest.raises(RecipeError, match=r"bits: got 7.0; allowed: what lies between the widths \(2, 4\)"):
        MixedPrecision(bits=7.0, widths=(2, 4)).check(source.config)
