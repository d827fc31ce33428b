"""States, layers, and a step's way through them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tests.compression.conftest import RunStep, SaveTiny
from torch import Tensor

from fastserve.compression.calibration.layer import Layer
from fastserve.compression.calibration.layer_step import LayerStep
from fastserve.compression.errors import RecipeError
from fastserve.compression.state.model_state import SavedState, read_part, write_part
from fastserve.compression.state.source_state import SourceState
from fastserve.compression.step import Context
from fastserve_kernels.formats import W8A8, Bitmap, BlockSparse, Dense, Int4, Int8, LowRank, Sparse24, Weight


class HealthMonitor(LayerStep, frozen=True, kw_only=True, tag="watch"):
    """Changes nothing, and keeps what it sees."""

    with_reference: ClassVar[bool] = True
    seen: ClassVar[list[Layer]] = []

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        self.seen.append(layer)


class Halve(LayerStep, frozen=True, kw_only=True, tag="halve"):
    """Halves the weights."""

    with_reference: ClassVar[bool] = True
    breaks_at: ClassVar[int | None] = None

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        if layer.index == Halve.breaks_at:
            raise KeyboardInterrupt
        for stage in layer.stages:
            layer.moments(stage[0])
        for name in layer.in_order(names):
            layer.replace(name, Dense(layer.dense(name).to(layer.dtype) / 2))


def test_a_state_comes_back_as_it_was_written(tmp_path: Path) -> None:
    dense = torch.randn(64, 64)
    part: dict[str, Tensor | Weight] = {
        "a": Int4.pack(dense, 32),
        "a.bias": torch.randn(64),
        "b": Int8.pack(dense, 32),
        "c": Sparse24.pack(dense),
        "d": Bitmap.pack(dense, density=0.5),
        "e": BlockSparse.pack(dense, (32, 32), density=0.5),
        "f": LowRank.pack(dense, 8),
        "g": W8A8.pack(dense),
        "norm.weight": torch.randn(64),
    }
    write_part(tmp_path / "part.safetensors", part)
    found = read_part(tmp_path / "part.safetensors")
    assert found.keys() == part.keys()
    for name, expected in part.items():
        given = found[name]
        assert type(given) is type(expected)
        assert torch.equal(_numbers(given), _numbers(expected))


def _numbers(part: Tensor | Weight) -> Tensor:
    return part.dequantize() if isinstance(part, Weight) else part


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "olmo2", "phi3"])
def test_layers_one_by_one_compute_what_the_whole_model_does(
    model_type: str, save_tiny: SaveTiny, run_step: RunStep
) -> None:
    source = SourceState(save_tiny(model_type, head_dim=16))
    step = HealthMonitor()
    run_step(step, source)
    layer = step.seen[-1]
    model = source.transformers_model(torch.float32)
    outputs: list[Tensor] = []
    hook = model.get_decoder().layers[-1].register_forward_hook(lambda _, __, out: outputs.append(out))
    windows = torch.randint(3, 128, (10, 32), generator=torch.Generator().manual_seed(1))[:8]
    with torch.no_grad():
        model(windows)
    hook.remove()
    out = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    torch.testing.assert_close(torch.cat(list(layer.batches())), out, rtol=1e-4, atol=1e-4)


def test_a_model_that_computes_tables_of_its_own_is_refused(save_tiny: SaveTiny) -> None:
    with pytest.raises(RecipeError, match="embed_scale"):
        _ = SourceState(save_tiny("gemma2", head_dim=16)).num_layers


def test_the_moments_are_those_of_the_inputs(source: SourceState, run_step: RunStep) -> None:
    run_step(Halve(targets=("model.layers.0.*",)), source, "first")
    step = HealthMonitor()
    step.seen.clear()
    run_step(step, source, "second")
    layer = step.seen[0]
    moments = layer.moments("mlp.down_proj")
    assert moments.tokens == 8 * 32
    assert moments.drift is not None
    assert moments.drift.abs().max() == 0
    torch.testing.assert_close(moments.hessian, moments.hessian.T)
    assert (moments.hessian.diagonal() >= moments.mean.square() - 1e-6).all()


def test_linears_that_share_an_input_are_a_stage(source: SourceState, run_step: RunStep) -> None:
    step = HealthMonitor()
    step.seen.clear()
    run_step(step, source)
    assert step.seen[0].stages == (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )


def test_only_the_targets_are_changed_and_reported(source: SourceState, run_step: RunStep) -> None:
    after = run_step(Halve(targets=("model.layers.1.mlp.*",)), source)
    for index in range(3):
        for name, weight in after.linears(index).items():
            before = source.linears(index)[name].dequantize()
            factor = 0.5 if index == 1 and name.startswith("mlp.") else 1.0
            assert torch.equal(weight.dequantize(), before * factor)
    assert after.notes["layer 0"] == []
    reports = after.notes["layer 1"]
    assert [report["name"] for report in reports] == [
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    for report in reports:
        assert report["weight_error"] == pytest.approx(0.5)
        assert report["output_error"] == pytest.approx(0.5)


def test_an_interrupted_step_goes_on_and_ends_in_the_same_bytes(
    source: SourceState, context: Context, run_step: RunStep, tmp_path: Path
) -> None:
    run_step(Halve(), source, "whole")
    Halve.breaks_at = 2
    with pytest.raises(KeyboardInterrupt):
        run_step(Halve(), source, "broken")
    assert (tmp_path / "broken" / "layer-0001.safetensors").is_file()
    Halve.breaks_at = 0  # the layers that are done are not computed again
    run_step(Halve(), source, "broken")
    Halve.breaks_at = None
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "broken").iterdir())
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name


def test_a_state_as_a_whole_model_has_its_weights(source: SourceState, run_step: RunStep) -> None:
    after = run_step(Halve(), source)
    model = SavedState(after.directory).transformers_model(torch.float32)
    found = dict(model.named_parameters())["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(found, after.linears(2)["mlp.up_proj"].dequantize())
    assert model.lm_head.weight is model.model.embed_tokens.weight
