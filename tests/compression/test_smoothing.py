"""Scaling of channels: the model computes what it did, and rounds better. AWQ and W8A8."""

from __future__ import annotations

import pytest
import torch
from tests.compression.conftest import RunStep, SaveTiny
from torch import Tensor
from transformers import AutoConfig

from fastserve.compression.calibration.layer import round_rows
from fastserve.compression.errors import RecipeError
from fastserve.compression.quantization.awq import Awq
from fastserve.compression.quantization.round_to_nearest import Round
from fastserve.compression.quantization.w8a8 import W8A8Step, candidate_scales
from fastserve.compression.state.model_state import State
from fastserve.compression.state.source_state import SourceState
from fastserve_kernels.formats import W8A8, Weight

TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(state: State) -> Tensor:
    return state.transformers_model(torch.float32)(TOKENS).logits


def loud(source: SourceState) -> SourceState:
    """With a few channels of the norms much larger, as trained models have them."""
    read = source.layer

    def layer(index: int) -> dict[str, Tensor | Weight]:
        part = dict(read(index))
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            norm = part[name]
            assert isinstance(norm, Tensor)
            part[name] = torch.where(torch.arange(len(norm)) % 16 == 3, norm * 20, norm)
        return part

    source.layer = layer  # type: ignore[method-assign]
    return source


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_scaled_models_compute_what_they_did(model_type: str, save_tiny: SaveTiny, run_step: RunStep) -> None:
    source = loud(SourceState(save_tiny(model_type)))
    after = run_step(Awq(group_size=32), source)
    assert not torch.equal(
        after.linears(0)["mlp.up_proj"].dequantize(), source.linears(0)["mlp.up_proj"].dequantize()
    )
    torch.testing.assert_close(logits(after), logits(source), rtol=1e-3, atol=1e-3)


def test_other_models_are_refused() -> None:
    config = AutoConfig.for_model("gpt_neox")
    with pytest.raises(RecipeError, match="awq: got a model of the type gpt_neox; allowed: llama, mistral"):
        Awq().check(config)


def test_what_is_rounded_afterwards_is_nearer(source: SourceState, run_step: RunStep) -> None:
    source, rounding = loud(source), Round(bits=3, group_size=32)
    wanted = logits(source)
    plain = logits(run_step(rounding, source, "plain"))
    scaled = logits(run_step(rounding, run_step(Awq(bits=3, group_size=32), source, "scaled"), "rounded"))
    assert (scaled - wanted).square().mean() < (plain - wanted).square().mean()


def test_a_stage_whose_linears_are_not_all_targets_stays(source: SourceState, run_step: RunStep) -> None:
    after = run_step(Awq(group_size=32, targets=("*.q_proj", "*.k_proj")), loud(source))
    assert torch.equal(
        after.linears(0)["self_attn.q_proj"].dequantize(), source.linears(0)["self_attn.q_proj"].dequantize()
    )


def test_eight_bits_for_weights_and_activations(source: SourceState, run_step: RunStep) -> None:
    after = run_step(W8A8Step(), source)
    assert all(isinstance(weight, W8A8) for weight in after.linears(0).values())
    reports = [report for index in range(source.num_layers) for report in after.notes[f"layer {index}"]]
    # Measured against the scaled weight, not against that of inputs which no longer come.
    assert all(0 < report["weight_error"] < 0.05 for report in reports)
    assert all(0 < report["output_error"] < 0.05 for report in reports)
    wanted, found = logits(source), logits(after)
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_smoothing_helps_where_channels_differ() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(500, 64), torch.randn(32, 64)
    x[:, ::16] *= 50

    def error(factors: Tensor) -> float:
        return float((round_rows(x / factors, 127) @ (weight * factors).T - x @ weight.T).norm())

    best = min(error(factors) for factors in candidate_scales(x, weight))
    assert best < 0.3 * error(torch.ones(64))
