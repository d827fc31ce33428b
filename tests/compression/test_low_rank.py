"""Low rank: truncation against the definition, the choice of ranks, and the step on a tiny model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.compression.conftest import RunStep
from torch import Tensor

from fastserve.compression.calibration.regression import Regression
from fastserve.compression.errors import RecipeError
from fastserve.compression.low_rank.low_rank_step import LowRankStep, squared_singular_values, truncate
from fastserve.compression.low_rank.ranks import Options, ranks_for_error, ranks_for_size
from fastserve.compression.state.model_state import SavedState
from fastserve.compression.state.source_state import SourceState
from fastserve.compression.step import Context
from fastserve_kernels.formats import Dense, LowRank


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs of a few large directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    return torch.randn(tokens, width, generator=generator) @ mix.T


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
def test_without_text_it_is_the_truncated_decomposition(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    down, up = truncate(weight, None, None, 5)
    torch.testing.assert_close(up @ down, LowRank.pack(weight, 5).dequantize(), atol=1e-4, rtol=1e-4)
    expected = torch.linalg.svdvals(weight).square()
    torch.testing.assert_close(squared_singular_values(weight, None, None).float(), expected)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_whitened_it_is_svd_llm_s_product(shape: tuple[int, int]) -> None:
    """W L truncated, times L^-1."""
    weight, x = torch.randn(shape).double(), correlated(300, shape[1]).double()
    hessian = x.T @ x / len(x)
    factor = torch.linalg.cholesky(hessian)
    left, singular, right = torch.linalg.svd(weight @ factor, full_matrices=False)
    expected = (left[:, :4] * singular[:4]) @ right[:4] @ torch.linalg.inv(factor)
    down, up = truncate(weight, hessian, None, 4)
    torch.testing.assert_close((up @ down).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_what_is_cut_off_is_the_error_of_the_outputs(shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape), correlated(300, shape[1])
    hessian, counts = x.T @ x / len(x), torch.rand(shape[0]) + 0.1
    squares = squared_singular_values(weight, hessian, counts)
    for rank in (1, 4, 9):
        down, up = truncate(weight, hessian, counts, rank)
        error = ((x @ (up @ down - weight).T).square() * counts).sum(1).mean()
        assert float(error) == pytest.approx(float(squares[rank:].sum()), rel=1e-3, abs=1e-4)


def test_no_product_of_the_rank_is_nearer_to_outputs_that_are_wanted() -> None:
    """Reduced-rank regression against descent from its result and from anywhere."""
    x, wanted = correlated(300, 10).double(), torch.randn(300, 6).double()
    found = Regression(wanted.T @ x / 300, x.T @ x / 300, torch.zeros(6, 10).double(), 0.0)
    down, up = truncate(found.solve_all(), found.hessian, None, 2)
    least = float((wanted - x @ (up @ down).double().T).square().sum(1).mean())
    for down0, up0 in ((down, up), (torch.randn(2, 10), torch.randn(6, 2))):
        down0, up0 = down0.double(), up0.double()
        for _ in range(200):
            hidden = x @ down0.T
            up0 = torch.linalg.lstsq(hidden, wanted).solution.T
            down0 = torch.linalg.pinv(up0) @ found.cross @ torch.linalg.inv(found.hessian)
        assert float((wanted - x @ (up0 @ down0).T).square().sum(1).mean()) >= least - 1e-5


def options(multiple: int = 8) -> dict[str, Options]:
    generator = torch.Generator().manual_seed(5)
    decays = {"a": 0.9, "b": 0.97, "c": 0.5}
    shapes = {"a": (64, 64), "b": (64, 128), "c": (96, 64)}
    return {
        name: Options.of(
            shapes[name],
            torch.rand(64, generator=generator).double() * decay ** torch.arange(64).double(),
            multiple,
        )
        for name, decay in decays.items()
    }


@given(st.floats(0.05, 0.95))
def test_ranks_keep_within_the_size_and_no_larger_one_fits(part: float) -> None:
    found = options(4)
    ranks = ranks_for_size(found, part)
    budget = part * sum(float(each.parameters[0]) for each in found.values())
    chosen = {name: int((each.ranks == ranks[name]).nonzero()) for name, each in found.items()}
    spent = sum(float(found[name].parameters[index]) for name, index in chosen.items())
    smallest = sum(float(each.parameters[-1]) for each in found.values())
    assert spent <= max(budget, smallest)
    for name, index in chosen.items():
        if index > 0:
            more = float(found[name].parameters[index - 1] - found[name].parameters[index])
            assert spent + more > budget


@pytest.mark.parametrize("part", [0.3, 0.5, 0.8])
def test_ranks_are_near_the_best_of_all_choices(part: float) -> None:
    found = options()
    ranks = ranks_for_size(found, part)
    error = sum(float(each.errors[each.ranks == ranks[name]]) for name, each in found.items())
    budget = part * sum(float(each.parameters[0]) for each in found.values())
    best = min(
        sum(float(e.errors[i]) for e, i in zip(found.values(), choice, strict=True))
        for choice in itertools.product(*(range(len(e.ranks)) for e in found.values()))
        if sum(float(e.parameters[i]) for e, i in zip(found.values(), choice, strict=True)) <= budget
    )
    assert error <= 1.1 * best


def test_a_linear_for_which_low_rank_saves_nothing_stays_dense() -> None:
    flat = Options.of((64, 64), torch.ones(64).double(), 8)
    steep = Options.of((64, 64), 0.1 ** torch.arange(64).double(), 8)
    assert ranks_for_size({"flat": flat, "steep": steep}, 0.7) == {"flat": 0, "steep": 8}
    assert all(flat.parameters[1:] < 64 * 64)


def test_ranks_for_an_error_are_the_least_that_reach_it() -> None:
    each = Options.of((64, 64), 0.5 ** torch.arange(64).double(), 1)
    rank = ranks_for_error({"a": each}, 0.1)["a"]
    assert 0.5**rank <= 0.01 < 0.5 ** (rank - 1)
    assert ranks_for_error({"a": Options.of((64, 64), torch.ones(64).double(), 8)}, 0.1) == {"a": 0}


def change(state: SavedState, context: Context) -> float:
    """Of the logits, relative."""
    with torch.no_grad():
        now = state.transformers_model(torch.float32)(context.calibration).logits
        then = context.source.transformers_model(torch.float32)(context.calibration).logits
    return float((now - then).norm() / then.norm())


def test_a_step_keeps_the_part_that_it_should(source: SourceState, run_step: RunStep) -> None:
    state = run_step(LowRankStep(parameters=0.6, multiple=4, targets=("*.mlp.*",)), source)
    kept = whole = 0
    for index in range(3):
        for name, weight in state.linears(index).items():
            assert name.startswith("mlp.") or isinstance(weight, Dense)
            if name.startswith("mlp."):
                whole += weight.out_features * weight.in_features
                if isinstance(weight, LowRank):
                    assert weight.down.shape[0] == state.notes["ranks"][f"model.layers.{index}.{name}"]
                kept += sum(t.numel() for t in vars(weight).values())
    assert 0.5 * whole < kept <= 0.6 * whole


def test_the_text_helps_and_so_does_the_update(
    source: SourceState, run_step: RunStep, context: Context
) -> None:
    def of(name: str, **fields: Any) -> float:
        return change(run_step(LowRankStep(parameters=0.6, multiple=4, **fields), source, name), context)

    plain = of("plain", weights="svd", update=False)
    whitened = of("whitened", update=False)
    updated = of("updated")
    assert updated < whitened < plain


def test_a_step_keeps_to_an_error(source: SourceState, run_step: RunStep) -> None:
    state = run_step(LowRankStep(error=0.3, multiple=1, update=False), source)
    for index in range(3):
        assert any(rank > 0 for rank in state.notes["ranks"].values())
        for report in state.notes[f"layer {index}"]:
            assert report["output_error"] < 0.4


@pytest.mark.parametrize("fields", [{}, {"parameters": 0.5, "error": 0.1}])
def test_either_a_size_or_an_error_is_wanted(source: SourceState, fields: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="parameters"):
        LowRankStep(**fields).check(source.config)  # type: ignore[arg-type]
