"""Structural pruning of tiny models: what leaves, what makes up for it, and what transformers makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.compression.conftest import RunStep, SaveTiny, make_context
from transformers import AutoModelForCausalLM

from fastserve.compression.calibration.layer import Layer
from fastserve.compression.calibration.regression import Regression
from fastserve.compression.errors import RecipeError
from fastserve.compression.pruning import structure
from fastserve.compression.pruning.model_shape import parameters
from fastserve.compression.pruning.structure import Structure, regression
from fastserve.compression.pruning.structure_survey import (
    LayerCosts,
    Sizes,
    choose_shape,
    sizes_within,
    total_cost,
)
from fastserve.compression.state.model_state import SavedState, dense
from fastserve.compression.state.source_state import SourceState
from fastserve.compression.step import Context
from fastserve.evaluation.evaluation import SequenceRunner
from fastserve.models.model_loader import load_model


def change(state: SavedState, context: Context) -> float:
    """Of the logits, relative."""
    with torch.no_grad():
        now, then = (
            model.transformers_model(torch.float32)(context.calibration).logits
            for model in (state, context.source)
        )
    return float((now - then).norm() / then.norm())


def test_a_smaller_model_is_an_ordinary_checkpoint(
    source: SourceState, run_step: RunStep, tmp_path: Path
) -> None:
    step = Structure(layers=1, kv_heads=1, channels=48)
    state = run_step(step, source)
    config = state.config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.num_attention_heads) == (2, 1, 2)
    assert (config.intermediate_size, config.head_dim) == (80, 16)
    state.transformers_model(torch.float32).save_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert sum(p.numel() for p in theirs.parameters()) == parameters(config)
    ours = load_model(str(tmp_path / "out"), dtype="float32", quantization="none")
    token_ids = make_context(source).calibration[0]
    with torch.no_grad():
        expected = theirs(token_ids[None]).logits[0]
    found = ours.logits(SequenceRunner(ours, 32).hidden(token_ids[None])[0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_dead_channels_leave_without_a_trace(save_tiny: SaveTiny, run_step: RunStep) -> None:
    directory = save_tiny()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    dead = torch.randperm(128)[:64]
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[dead] = 0
    model.save_pretrained(directory)
    source = SourceState(directory)
    state = run_step(Structure(channels=64), source)
    assert change(state, make_context(source)) < 1e-3


def test_a_dead_group_of_heads_leaves_without_a_trace(save_tiny: SaveTiny, run_step: RunStep) -> None:
    directory = save_tiny()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for index, layer in enumerate(model.model.layers):
        start = 16 * (index % 2)
        layer.self_attn.v_proj.weight.data[start : start + 16] = 0
    model.save_pretrained(directory)
    source = SourceState(directory)
    state = run_step(Structure(kv_heads=1), source)
    assert state.config.num_attention_heads == 2
    assert change(state, make_context(source)) < 1e-3


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_that_does_nothing_leaves_without_a_trace(
    save_tiny: SaveTiny, run_step: RunStep, bias: bool
) -> None:
    directory = save_tiny(attention_bias=bias, mlp_bias=bias)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        for parameter in linear.parameters():
            parameter.data.zero_()
    model.save_pretrained(directory)
    source = SourceState(directory)
    state = run_step(Structure(layers=1), source)
    assert state.notes["shape"]["layers"] == [0, 2]
    assert change(state, make_context(source)) < 1e-3


def test_what_stays_makes_up_for_what_leaves(
    source: SourceState, run_step: RunStep, context: Context
) -> None:
    """Against the same columns left out, the others as they were."""
    state = run_step(Structure(channels=64), source)
    plain = source.transformers_model(torch.float32)
    for index, layer in enumerate(plain.model.layers):
        kept = dense(state.layer(index))["mlp.up_proj.weight"]
        gone = [not any(torch.equal(row, k) for k in kept) for row in layer.mlp.up_proj.weight.data]
        assert sum(gone) == 64
        layer.mlp.down_proj.weight.data[:, torch.tensor(gone)] = 0
    with torch.no_grad():
        original = source.transformers_model(torch.float32)(context.calibration).logits
        masked = plain(context.calibration).logits
    assert change(state, context) < 0.9 * float((masked - original).norm() / original.norm())


def test_a_part_of_the_parameters_leaves(source: SourceState, run_step: RunStep) -> None:
    state = run_step(Structure(parameters=0.3, multiple=16), source)
    before, after = state.notes["parameters"]
    assert (
        after
        == parameters(state.config)
        == sum(p.numel() for p in state.transformers_model(torch.float32).parameters())
    )
    assert after <= 0.7 * before
    assert state.config.intermediate_size % 16 == 0


def test_an_interrupted_run_ends_in_the_same_model(
    source: SourceState, run_step: RunStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Structure(kv_heads=1, channels=64)
    whole = run_step(step, source, "whole")
    with monkeypatch.context() as patch:
        patch.setattr(structure, "regression", _fail_at(2))
        with pytest.raises(KeyboardInterrupt):
            run_step(step, source, "broken")
    again = run_step(step, source, "broken")
    for index in range(3):
        for name, tensor in dense(whole.layer(index)).items():
            assert torch.equal(tensor, dense(again.layer(index))[name])
    assert not (again.directory / structure.MASKED).exists()


def _fail_at(index: int) -> Callable[[Layer, str], Regression]:
    def fail(layer: Layer, name: str) -> Regression:
        if layer.index == index:
            raise KeyboardInterrupt
        return regression(layer, name)

    return fail


@pytest.mark.parametrize("bias", [False, True])
def test_candidates_are_the_largest_within_the_budget(save_tiny: SaveTiny, bias: bool) -> None:
    config = SourceState(save_tiny(attention_bias=bias, mlp_bias=bias)).config
    budget = 0.7 * parameters(config)
    found = sizes_within(config, 0.3, 8)
    assert Sizes(3, 2, 128) not in found
    for sizes in found:
        smaller = type(config)(**(config.to_dict() | {"head_dim": 16}))
        smaller.num_hidden_layers, smaller.num_key_value_heads = sizes.layers, sizes.kv_heads
        smaller.num_attention_heads, smaller.intermediate_size = 2 * sizes.kv_heads, sizes.channels
        assert parameters(smaller) <= budget
        smaller.intermediate_size += 8
        assert parameters(smaller) > budget or sizes.channels == 128


def test_the_cheapest_sizes_are_chosen() -> None:
    costs = [
        LayerCosts(influence, torch.tensor([0.0, heads]), torch.arange(4.0) * channels)
        for influence, heads, channels in ((1.0, 0.5, 0.2), (0.1, 0.6, 0.3), (2.0, 0.7, 0.1))
    ]
    assert total_cost(costs, Sizes(3, 2, 4)) == 0
    assert total_cost(costs, Sizes(2, 1, 3)) == pytest.approx(0.1 + 1.2 + 0.3)
    shape = choose_shape(costs, [Sizes(3, 1, 4), Sizes(2, 2, 4), Sizes(3, 2, 2)])
    assert (shape.layers, shape.kv_heads, shape.channels) == ((0, 2), 2, 4)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "parameters"),
        ({"parameters": 0.2, "layers": 1}, "parameters"),
        ({"layers": 3}, "layers"),
        ({"kv_heads": 2}, "kv_heads"),
        ({"channels": 128}, "channels"),
        ({"parameters": 0.99}, "parameters"),
        ({"parameters": 1.5}, "parameters"),
    ],
)
def test_impossible_amounts_are_refused(source: SourceState, fields: dict[str, float], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        Structure(**fields).check(source.config)  # type: ignore[arg-type]


def test_other_layers_are_refused(save_tiny: SaveTiny) -> None:
    source = SourceState(save_tiny("phi3", pad_token_id=0))
    with pytest.raises(RecipeError, match="phi3"):
        Structure(layers=1).check(source.config)
