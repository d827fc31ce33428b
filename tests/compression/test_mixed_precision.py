"""Bits by sensitivity: the allocation, the estimate, and the step."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compression.conftest import RunStep

from fastserve.compression.mixed_precision import MixedPrecision, allocate
from fastserve.compression.sensitivity import sensitivities
from fastserve.compression.source_state import SourceState
from fastserve.compression.step import Context, RecipeError
from fastserve_kernels.compressed_tensors import bits_of
from fastserve_kernels.formats import Int4, Int8

WIDTHS = (2, 3, 4, 6)


@settings(deadline=None)
@given(
    factors=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    sizes=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    bits=st.floats(2, 6),
)
def test_bits_are_within_the_budget_and_near_the_best(
    factors: list[float], sizes: list[int], bits: float
) -> None:
    names = [f"linear {index}" for index in range(4)]
    costs = {name: {b: f * 4.0**-b for b in WIDTHS} for name, f in zip(names, factors, strict=True)}
    size = dict(zip(names, sizes, strict=True))

    def spent(given: dict[str, int]) -> int:
        return sum(given[name] * size[name] for name in names)

    def cost(given: dict[str, int]) -> float:
        return sum(costs[name][given[name]] for name in names)

    found = allocate(costs, size, bits)
    budget = bits * sum(sizes)
    assert spent(found) <= budget
    # Costs are convex here, so that the greedy choice is the best until a step is too much for what is left:
    # it is at least as good as any choice that spends less by the widest step.
    reach = spent(found) - 2 * max(sizes)
    every = (dict(zip(names, widths, strict=True)) for widths in itertools.product(WIDTHS, repeat=4))
    assert all(cost(found) <= cost(other) * (1 + 1e-9) for other in every if spent(other) <= reach)


def test_equal_linears_get_equal_bits() -> None:
    costs = {name: {b: 4.0**-b for b in WIDTHS} for name in "abcd"}
    assert allocate(costs, dict.fromkeys("abcd", 10), 3.0) == dict.fromkeys("abcd", 3)


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
            estimate += float(((change @ sensitivity.gram) * change).sum(1) @ sensitivity.rows) / 2
        after = model(context.calibration).logits.log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert divergence / 2 < estimate < divergence * 2


def test_a_model_has_the_bits_that_were_given(source: SourceState, run_step: RunStep) -> None:
    after = run_step(MixedPrecision(bits=3.5, group_size=32), source)
    given = after.notes["bits"]
    total = sum(
        weight.out_features * weight.in_features for i in range(3) for weight in source.linears(i).values()
    )
    spent = 0
    for index in range(3):
        for name, weight in after.linears(index).items():
            assert isinstance(weight, Int4 | Int8)
            bits = given[f"model.layers.{index}.{name}"]
            assert bits_of(weight) <= bits
            spent += bits * weight.out_features * weight.in_features
    assert 3.3 * total < spent <= 3.5 * total
    assert len(set(given.values())) > 1


def test_an_average_beyond_the_widths_is_refused(source: SourceState) -> None:
    with pytest.raises(RecipeError, match=r"bits: got 7.0; allowed: what lies between the widths \(2, 4\)"):
        MixedPrecision(bits=7.0, widths=(2, 4)).check(source.config)
