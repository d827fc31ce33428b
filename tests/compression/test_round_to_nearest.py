"""The step `round`: granularities, ranges, zero points, biases, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.compression.conftest import RunStep, SaveTiny
from torch import Tensor

from fastserve.compression.calibration import layer_step
from fastserve.compression.calibration.layer import Layer
from fastserve.compression.calibration.layer_step import LayerStep
from fastserve.compression.errors import RecipeError
from fastserve.compression.pruning.magnitude import Magnitude
from fastserve.compression.quantization.bias_correction import corrected_bias
from fastserve.compression.quantization.codebooks import Codebook
from fastserve.compression.quantization.round_to_nearest import Round
from fastserve.compression.state.source_state import SourceState
from fastserve_kernels.formats import Int4, Int8


def test_exact_zero_points_give_the_values_of_the_formula(source: SourceState, run_step: RunStep) -> None:
    after = run_step(Round(bits=3, group_size=32, zero_points="exact"), source)
    for name, weight in after.linears(2).items():
        groups = source.linears(2)[name].dequantize().unflatten(1, (-1, 32))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        codes = ((groups - low) / (high - low) * 7).round()
        expected = (codes * (high - low) / 7 + low).flatten(1)
        torch.testing.assert_close(weight.dequantize(), expected, rtol=1e-5, atol=1e-5)


def test_a_whole_tensor_shares_a_scale(source: SourceState, run_step: RunStep) -> None:
    weight = run_step(Round(bits=8, group_size="tensor"), source).linears(0)["mlp.up_proj"]
    assert isinstance(weight, Int8)
    assert weight.scales.unique().numel() == 1


def test_ranges_for_the_outputs_cost_these_least(source: SourceState, run_step: RunStep) -> None:
    def error(clip: Any) -> float:
        after = run_step(Round(bits=3, group_size=32, clip=clip), source, clip)
        return sum(float(report["output_error"]) for report in after.notes["layer 0"])

    assert error("outputs") < error("none")


def test_eight_bits_cost_less_than_four(source: SourceState, run_step: RunStep) -> None:
    four = run_step(Round(bits=4), source, "four").linears(0)["mlp.up_proj"]
    eight = run_step(Round(bits=8), source, "eight").linears(0)["mlp.up_proj"]
    assert isinstance(four, Int4)
    weight = source.linears(0)["mlp.up_proj"].dequantize()
    assert (eight.dequantize() - weight).norm() < 0.1 * (four.dequantize() - weight).norm()


def test_a_corrected_bias_keeps_the_mean_of_the_output() -> None:
    torch.manual_seed(0)
    x, before, after, bias = torch.randn(50, 8) + 1, torch.randn(4, 8), torch.randn(4, 8), torch.randn(4)
    new = corrected_bias(bias, before, after, x.mean(0))
    torch.testing.assert_close((x @ after.T + new).mean(0), (x @ before.T + bias).mean(0))


def test_biases_are_corrected_where_there_are_any(save_tiny: SaveTiny, run_step: RunStep) -> None:
    source = SourceState(save_tiny("qwen2"))
    after = run_step(Round(bits=3, group_size=32, bias_correction=True), source)
    before = source.others(0)
    changed = {name for name, tensor in after.others(0).items() if not torch.equal(tensor, before[name])}
    assert changed == {f"self_attn.{name}_proj.bias" for name in "qkv"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 128}, "group_size: got 128; allowed: a divisor of the 64 columns"),
        ({"bias_correction": True}, "bias_correction: got true; allowed: false"),
        ({"clip": "outputs", "group_size": "tensor"}, 'clip: got "outputs"; allowed: "none"'),
        ({"clip": "weights", "zero_points": "exact"}, 'clip: got "weights"; allowed: "none"'),
    ],
)
def test_what_is_impossible_is_refused(source: SourceState, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Round(**fields).check(source.config)


@pytest.mark.parametrize(
    ("step", "sequences"),
    [
        (Round(group_size=32), 2),
        (Codebook(group_size=32), 2),
        (Magnitude(), 2),
        (Round(group_size=32, clip="outputs"), 8),
        (Codebook(group_size=32, codebook="k-means"), 8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_step_that_measures_nothing_runs_little_text_through_the_layers(
    source: SourceState, run_step: RunStep, monkeypatch: pytest.MonkeyPatch, step: LayerStep, sequences: int
) -> None:
    monkeypatch.setattr(layer_step, "REPORT_TOKENS", 64)
    run, seen = Layer.run, []

    def watched(layer: Layer, hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return run(layer, hidden)

    monkeypatch.setattr(Layer, "run", watched)
    state = run_step(step, source)
    assert max(seen) == sequences
    assert state.notes["layer 2"][0]["output_error"] > 0
