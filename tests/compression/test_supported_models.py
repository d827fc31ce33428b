"""Models that cannot be compressed are refused by name before anything is computed; others are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.compression.conftest import RunStep, SaveTiny

from fastserve.compression.errors import RecipeError
from fastserve.compression.quantization.gptq import Gptq
from fastserve.compression.state.source_state import SourceState

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("qwen3_moe", EXPERTS, r"a mixture of experts keeps model\.layers\.0\.mlp\.experts\.down_proj"),
        ("mixtral", {"num_local_experts": 4}, r"a mixture of experts keeps model\.layers\.0\.mlp\.experts"),
        ("falcon", {}, "it keeps its decoder layers otherwise than in `layers`"),
        ("opt", {}, r"it has model\.decoder\.embed_positions\.weight, .* outside its layers"),
        (
            "phi",
            {},
            r"it has model\.final_layernorm\.bias, model\.final_layernorm\.weight outside its layers",
        ),
        ("gemma2", {"head_dim": 16}, r"it computes model\.embed_tokens\.embed_scale as it is made"),
    ],
)
def test_an_architecture_that_no_step_takes_is_refused_by_name(
    save_tiny: SaveTiny, model_type: str, config: dict[str, Any], reason: str
) -> None:
    directory = save_tiny(model_type, **config)
    with pytest.raises(RecipeError, match=f"the type {model_type} cannot be compressed: {reason}") as caught:
        SourceState(directory)
    assert "supported: models whose decoder layers" in str(caught.value)
    assert "Llama" in str(caught.value)


def change(directory: Path, **changes: Any) -> None:
    """Replaces tensors of a checkpoint; None: takes them out."""
    tensors = load_file(directory / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})


def test_a_checkpoint_with_a_hole_is_refused_by_name(save_tiny: SaveTiny) -> None:
    directory = save_tiny()
    name = "model.layers.2.mlp.up_proj.weight"
    change(directory, **{name: None})
    with pytest.raises(RecipeError, match=rf"has no tensor {name}; needed: one of shape \(128, 64\)"):
        SourceState(directory)


def test_a_tensor_of_another_shape_is_refused_by_name(save_tiny: SaveTiny) -> None:
    directory = save_tiny()
    name = "model.layers.2.mlp.up_proj.weight"
    change(directory, **{name: load_file(directory / "model.safetensors")[name][:100].contiguous()})
    with pytest.raises(RecipeError, match=rf"{name} has the shape \(100, 64\); needed: \(128, 64\)"):
        SourceState(directory)


@pytest.mark.parametrize("model_type", ["stablelm", "starcoder2", "nemotron"])
def test_a_last_norm_with_a_bias_is_taken(save_tiny: SaveTiny, run_step: RunStep, model_type: str) -> None:
    source = SourceState(save_tiny(model_type, num_hidden_layers=1))
    state = run_step(Gptq(group_size=32), source)
    assert all(report["output_error"] < 0.2 for report in state.notes["layer 0"])
