"""Steps that prune: the masks they choose, and their way through a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.compression.conftest import RunStep
from torch import Tensor

from fastserve.compression.calibration.hessian import damped
from fastserve.compression.calibration.linear_report import output_error
from fastserve.compression.errors import RecipeError
from fastserve.compression.pruning.admm import Admm, admm_mask
from fastserve.compression.pruning.magnitude import Magnitude, quantile, weight_histogram
from fastserve.compression.pruning.pruning_step import PruningStep
from fastserve.compression.pruning.reconstruction import reconstruct
from fastserve.compression.pruning.sparsegpt import SparseGpt, sparsegpt_mask
from fastserve.compression.pruning.wanda import Wanda, wanda_mask
from fastserve.compression.quantization.round_to_nearest import Round
from fastserve.compression.sparsity_patterns import (
    ROWS,
    UNSTRUCTURED,
    BlockPattern,
    Pattern,
    TwoOfFour,
    mask_of,
)
from fastserve.compression.state.model_state import State
from fastserve.compression.state.source_state import SourceState
from fastserve_kernels.formats import Bitmap, BlockSparse, Dense, Sparse24

BLOCKS = BlockPattern(16, 16)
PATTERNS = (UNSTRUCTURED, TwoOfFour(), BLOCKS)
STEPS = (Magnitude, Wanda, SparseGpt, Admm)


def problem(rows: int = 64, columns: int = 256) -> tuple[Tensor, Tensor]:
    """A weight, and the damped Hessian of correlated inputs of many sizes."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns // 2, columns, generator=generator)
    x = torch.randn(1024, columns // 2, generator=generator) @ mixing
    x = x * torch.randn(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator), damped(x.T @ x / len(x))


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, TwoOfFour()])
def test_the_more_a_method_looks_at_the_smaller_is_the_error(pattern: Pattern) -> None:
    weight, hessian = problem()
    wanda = wanda_mask(weight, hessian, pattern, 0.5)
    errors = [
        output_error(pruned - weight, weight, hessian)
        for pruned in (
            weight * pattern.mask(weight.abs(), 0.5),
            weight * wanda,
            reconstruct(weight, hessian, wanda),
            reconstruct(weight, hessian, sparsegpt_mask(weight, hessian, pattern, 0.5)),
            reconstruct(weight, hessian, admm_mask(weight, hessian, pattern, 0.5)),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[1]


@pytest.mark.parametrize("method", [sparsegpt_mask, admm_mask])
def test_blocks_that_make_up_for_others_lose_much_less_than_wandas(method: Any) -> None:
    weight, hessian = problem()
    wanda = output_error(weight * wanda_mask(weight, hessian, BLOCKS, 0.5) - weight, weight, hessian)
    solved = reconstruct(weight, hessian, method(weight, hessian, BLOCKS, 0.5))
    assert output_error(solved - weight, weight, hessian) < 0.7 * wanda


@pytest.mark.parametrize("method", [sparsegpt_mask, admm_mask, wanda_mask])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_have_their_pattern_and_their_count(method: Any, pattern: Pattern) -> None:
    weight, hessian = problem()
    mask = method(weight, hessian, pattern, 0.5)
    found = mask_of(pattern.pack(weight, mask))
    assert found is not None
    assert torch.equal(found, mask)
    assert mask.float().mean() == 0.5


@pytest.mark.parametrize("method", [sparsegpt_mask, wanda_mask])
def test_uncorrelated_inputs_leave_nothing_to_look_at_but_sizes(method: Any) -> None:
    weight, sizes = problem()[0], torch.linspace(0.5, 2, 256)
    mask = method(weight, sizes.square().diag(), TwoOfFour(), 0.5)
    assert torch.equal(mask, TwoOfFour().mask((weight * sizes).abs()))


def test_wanda_compares_single_weights_within_their_row() -> None:
    weight = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    hessian = torch.diag(torch.tensor([16.0, 1, 1, 1]))
    mask = wanda_mask(weight, hessian, UNSTRUCTURED, 0.5)
    assert mask.tolist() == [[True, False, False, True]] * 2


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(
    ("pattern", "format"), [("unstructured", Bitmap), ("2:4", Sparse24), ("block 16x32", BlockSparse)]
)
def test_a_step_leaves_half_of_every_linear_in_the_pattern(
    source: SourceState, run_step: RunStep, kind: type[PruningStep], pattern: str, format: type
) -> None:
    after = run_step(kind(pattern=pattern), source)
    for index in range(source.num_layers):
        for weight in after.linears(index).values():
            mask = mask_of(weight)
            assert type(weight) is format
            assert mask is not None
            assert mask.float().mean() == 0.5


def test_what_is_not_targeted_stays_dense(source: SourceState, run_step: RunStep) -> None:
    after = run_step(Wanda(targets=("*.mlp.*",), sparsity=0.25), source)
    for name, weight in after.linears(1).items():
        assert type(weight) is (Bitmap if name.startswith("mlp.") else Dense)
        assert (weight.dequantize() == 0).float().mean() == (0.25 if name.startswith("mlp.") else 0)


def test_wanda_keeps_values_unless_they_are_reconstructed(source: SourceState, run_step: RunStep) -> None:
    before = source.linears(0)["self_attn.q_proj"].dequantize()
    plain = run_step(Wanda(), source, "plain").linears(0)["self_attn.q_proj"]
    solved = run_step(Wanda(reconstruct=True), source, "solved").linears(0)["self_attn.q_proj"]
    mask = mask_of(plain)
    assert mask is not None
    assert torch.equal(plain.dequantize(), before * mask)
    assert not solved.dequantize()[~mask].any()
    assert not torch.allclose(solved.dequantize(), before * mask)


def test_later_layers_make_up_for_the_drift_of_earlier_ones(source: SourceState, run_step: RunStep) -> None:
    """The first stage of the first layer sees the inputs as they were, so that nothing has drifted there."""
    held = run_step(SparseGpt(drift=1.0), source, "held")
    free = run_step(SparseGpt(drift=0.0), source, "free")
    first, last = "self_attn.q_proj", "mlp.down_proj"
    assert torch.equal(held.linears(0)[first].dequantize(), free.linears(0)[first].dequantize())
    assert not torch.equal(held.linears(2)[last].dequantize(), free.linears(2)[last].dequantize())


def test_the_same_seed_gives_the_same_bytes(source: SourceState, run_step: RunStep) -> None:
    one, two = (run_step(Admm(), source, name).linears(2)["mlp.up_proj"] for name in ("one", "two"))
    assert torch.equal(one.dequantize(), two.dequantize())


def test_a_threshold_leaves_out_what_is_below_it(source: SourceState, run_step: RunStep) -> None:
    after = run_step(Magnitude(threshold=0.1), source)
    before = source.linears(0)["mlp.up_proj"].dequantize()
    assert torch.equal(after.linears(0)["mlp.up_proj"].dequantize(), before.where(before.abs() >= 0.1, 0))


def test_a_threshold_of_rows_is_of_their_mean_magnitude(source: SourceState, run_step: RunStep) -> None:
    before = source.linears(0)["mlp.up_proj"].dequantize()
    means = before.abs().mean(1, keepdim=True)
    after = run_step(Magnitude(pattern="rows", threshold=float(means.median())), source)
    assert torch.equal(after.linears(0)["mlp.up_proj"].dequantize(), before * (means >= means.median()))


@pytest.mark.parametrize("pattern", ["unstructured", "rows", "block 16x16"])
def test_over_the_model_the_share_holds_for_all_linears_together(
    source: SourceState, run_step: RunStep, pattern: str
) -> None:
    after = run_step(Magnitude(pattern=pattern, sparsity=0.3, over="model"), source)
    left_out = [weight.dequantize() == 0 for index in range(3) for weight in after.linears(index).values()]
    shares = {float(zeros.float().mean()) for zeros in left_out}
    together = sum(int(zeros.sum()) for zeros in left_out) / sum(zeros.numel() for zeros in left_out)
    assert together == pytest.approx(0.3, abs=0.005)
    assert len(shares) > 1


def test_the_quantile_of_a_histogram_is_that_of_the_weights() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    threshold = quantile(weight_histogram(weight, UNSTRUCTURED), 0.4)
    assert threshold == pytest.approx(float(weight.abs().quantile(0.4)), rel=2e-3)
    assert weight_histogram(weight, ROWS).sum() == weight.numel()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Wanda(pattern="2:4", sparsity=0.6), "sparsity: got 0.6; allowed with the pattern 2:4: 0.5"),
        (Magnitude(pattern="2:4", threshold=0.1), "threshold: got 0.1; allowed with the pattern 2:4: None"),
        (Magnitude(pattern="2:4", over="row"), "over: got 'row'; allowed with the pattern 2:4: 'matrix'"),
        (Magnitude(sparsity=0.5, threshold=0.1), "threshold: got 0.1 beside a sparsity"),
        (Magnitude(threshold=0.1, over="model"), "over: got 'model'; a threshold is over nothing"),
        (Admm(pattern="block 128x16"), r"self_attn.q_proj blocks of 128x16 do not divide 64x64"),
        (SparseGpt(pattern="rows"), "pattern: got 'rows'; allowed with magnitude and wanda"),
    ],
)
def test_what_cannot_be_is_refused_by_name(source: State, step: PruningStep, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        step.check(source.config)


def test_a_block_only_has_to_divide_the_targets(source: SourceState) -> None:
    Wanda(pattern="block 128x16", targets=("*.mlp.up_proj",)).check(source.config)


def test_sparsity_is_reported_where_weights_were_left_out_and_nowhere_else(
    source: SourceState, run_step: RunStep
) -> None:
    """A code that stands for 0 is a value like others."""
    pruned = run_step(Wanda(targets=("*.mlp.*",)), source, "pruned")
    rounded = run_step(Round(bits=4, group_size=32), pruned, "rounded")
    weight = rounded.linears(0)["self_attn.q_proj"].dequantize()
    assert (weight == 0).any()
    for linear in rounded.notes["layer 0"]:
        if ".mlp." in linear["name"]:
            assert linear["sparsity"] >= 0.5
        else:
            assert linear["sparsity"] is None
