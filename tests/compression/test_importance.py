"""What tokens count: that it is right, that moments are weighed by it, that it is measured once."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tests.compression.conftest import RunStep

from fastserve.compression.calibration.importance import FILE, measure_importance
from fastserve.compression.calibration.layer import Layer
from fastserve.compression.calibration.layer_step import LayerStep
from fastserve.compression.calibration.sensitivity import Sensitivity
from fastserve.compression.state.model_state import StateWriter
from fastserve.compression.state.source_state import SourceState
from fastserve.compression.step import Context

NAMES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


class WatchWeighed(LayerStep, frozen=True, kw_only=True, tag="watch_weighed"):
    """Changes nothing, and keeps the moments of the second layer."""

    weights_tokens: ClassVar[bool] = True
    seen: ClassVar[dict[str, torch.Tensor]] = {}

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        if layer.index == 1:
            self.seen.update({name: layer.moments(name).hessian for name in NAMES})
            self.seen["importance"] = torch.tensor(layer.moments("self_attn.v_proj").importance)


def test_a_token_counts_the_square_of_its_slopes(
    source: SourceState, context: Context, tmp_path: Path
) -> None:
    """For labels drawn anew: means over many draws agree, those of one come near."""
    found = measure_importance(source, StateWriter(tmp_path / "step"), context).of_layer("model.layers.1.")
    expected = slopes_of_whole_model(source, context, "model.layers.1.self_attn.v_proj")
    given = found["self_attn.v_proj"].tokens
    assert given.shape == context.calibration.shape
    assert given.mean() == pytest.approx(float(expected.mean()), rel=0.2)
    assert torch.corrcoef(torch.stack([given.mean(0), expected.mean(0)]))[0, 1] > 0.8


def slopes_of_whole_model(source: SourceState, context: Context, name: str) -> torch.Tensor:
    """[samples, T], the mean over 20 draws of the labels."""
    model = source.transformers_model(torch.float32)
    kept: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda _, __, out: kept.append(out))
    total = torch.zeros(context.calibration.shape)
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        log_probabilities = model(context.calibration, use_cache=False).logits.log_softmax(-1)
        labels = torch.multinomial(log_probabilities.exp().flatten(0, 1), 1, generator=generator)
        chosen = log_probabilities.flatten(0, 1).gather(1, labels).sum()
        (slope,) = torch.autograd.grad(chosen, kept.pop())
        total += slope.square().sum(-1)
    return total / 20


def test_moments_are_weighed_by_it(
    source: SourceState, context: Context, run_step: RunStep, tmp_path: Path
) -> None:
    run_step(WatchWeighed(), source)
    counts = measure_importance(source, StateWriter(tmp_path / "step"), context).of_layer("model.layers.1.")
    model = source.transformers_model(torch.float32)
    inputs: dict[str, torch.Tensor] = {}
    for name in NAMES:
        model.get_submodule(f"model.layers.1.{name}").register_forward_pre_hook(
            lambda _, given, name=name: inputs.update({name: given[0].flatten(0, 1)})
        )
    with torch.no_grad():
        model(context.calibration)
    for name in NAMES:
        weights, x = counts[name].tokens.view(-1, 1), inputs[name]
        torch.testing.assert_close(
            WatchWeighed.seen[name], x.T @ (x * weights) / weights.sum(), rtol=1e-3, atol=1e-5
        )
    importance = counts["self_attn.v_proj"].tokens.mean()
    assert float(WatchWeighed.seen["importance"]) == pytest.approx(float(importance))


def test_it_is_measured_once(source: SourceState, context: Context, tmp_path: Path) -> None:
    seen: list[int] = []

    def see(index: int, found: dict[str, Sensitivity]) -> None:
        seen.append(index)

    for _ in range(2):
        measure_importance(source, StateWriter(tmp_path / "step"), context, see)
    assert seen == [2, 1, 0]
    assert [file.name for file in (tmp_path / "step").iterdir()] == [FILE]
