"""Recipes: what they say when something in them is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.compression.conftest import SIZES
from transformers import AutoConfig, PretrainedConfig

from fastserve.compression.errors import RecipeError
from fastserve.compression.recipe import PRESETS, check_recipe, parse_recipe, preset, read_recipe


@pytest.fixture
def config() -> PretrainedConfig:
    return AutoConfig.for_model("llama", **SIZES)


def test_a_recipe_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 7\nsteps:\n- step: wanda\n  pattern: '2:4'\n- {step: gptq, bits: 3}\n")
    recipe = read_recipe(path)
    assert [step.name for step in recipe.steps] == ["wanda", "gptq"]
    assert recipe.seed == 7
    assert recipe.calibration.samples == 128


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_recipe_for_an_ordinary_model(name: str, config: PretrainedConfig) -> None:
    check_recipe(preset(name), config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "recipe: got list; allowed: a mapping with `steps`"),
        ({}, "missing required field `steps`"),
        ({"steps": []}, r"steps: got \[\]; expected `array` of length >= 1"),
        ({"steps": ["gptq"]}, r"steps\[0\]: got 'gptq'; allowed: a mapping with `step`"),
        ({"steps": [{"step": "gtpq"}]}, r"steps\[0\].step: got 'gtpq'; allowed: .*gptq"),
        ({"steps": [{"step": "gptq", "bit": 4}]}, r"steps\[0\] \(gptq\): unknown field bit; allowed: .*bits"),
        ({"steps": [{"step": "gptq", "bits": 9}]}, r"steps\[0\].bits: got 9; expected `int` <= 8"),
        ({"steps": [{"step": "gptq"}], "sed": 1}, "recipe: unknown field sed; allowed: steps, calibration"),
        ({"steps": [{"step": "gptq"}], "calibration": {"length": 3}}, "calibration.length: got 3; expected"),
        ({"steps": [{"step": "gptq"}], "evaluation": 3}, "evaluation: got 3; allowed: a mapping"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(data)


def test_a_file_that_is_missing_or_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no-such\.yaml"):
        read_recipe(tmp_path / "no-such.yaml")
    (tmp_path / "bad.yaml").write_text("steps: [")
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        read_recipe(tmp_path / "bad.yaml")


def test_a_step_may_not_undo_another(config: PretrainedConfig) -> None:
    undone = parse_recipe({"steps": [{"step": "gptq"}, {"step": "wanda"}]})
    with pytest.raises(RecipeError, match=r"steps\[1\] \(wanda\): model.layers.0.*is left quantized"):
        check_recipe(undone, config)
    apart = [{"step": "gptq", "targets": ["*.mlp.*"]}, {"step": "wanda", "targets": ["*.self_attn.*"]}]
    check_recipe(parse_recipe({"steps": apart}), config)


def test_targets_that_match_nothing_are_refused(config: PretrainedConfig) -> None:
    recipe = parse_recipe({"steps": [{"step": "gptq", "targets": ["mlp.down"]}]})
    with pytest.raises(RecipeError, match=r"targets: got mlp.down, which match no linear; there are model"):
        check_recipe(recipe, config)


def test_what_is_impossible_with_the_model_is_refused(config: PretrainedConfig) -> None:
    recipe = parse_recipe({"steps": [{"step": "gptq", "group_size": 128}]})
    with pytest.raises(RecipeError, match=r"steps\[0\] \(gptq\): group_size: got 128"):
        check_recipe(recipe, config)


def test_a_step_is_checked_with_the_shape_that_those_before_it_leave(config: PretrainedConfig) -> None:
    cut = {"step": "structure", "channels": 37, "layers": 1}
    with pytest.raises(
        RecipeError, match=r"steps\[1\] \(gptq\): group_size: got 32; .* the 91 columns of model"
    ):
        check_recipe(parse_recipe({"steps": [cut, {"step": "gptq", "group_size": 32}]}), config)
    gone = {"step": "round", "group_size": None, "targets": ["model.layers.2.*"]}
    with pytest.raises(RecipeError, match=r"steps\[1\] \(round\): targets: .* match no linear"):
        check_recipe(parse_recipe({"steps": [cut, gone]}), config)
