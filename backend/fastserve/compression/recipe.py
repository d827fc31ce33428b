"""A recipe: the steps that make a checkpoint smaller, in order, and the text they are measured on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from transformers import PretrainedConfig

from fastserve.compression.errors import RecipeError
from fastserve.compression.state.meta_model import MetaModel
from fastserve.compression.step import WeightKind
from fastserve.compression.steps import STEPS, AnyStep
from fastserve.corpus.sources import Calibration, Evaluation


class Recipe(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A recipe of `fastserve compress`."""

    steps: Annotated[tuple[AnyStep, ...], Meta(min_length=1)]
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    seed: Annotated[int, Meta(ge=0, description="random seed")] = 0


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises RecipeError."""
    try:
        return parse_recipe(msgspec.yaml.decode(path.read_bytes()))
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise RecipeError(f"recipe {path}: {error}") from error


def parse_recipe(data: object) -> Recipe:
    """A recipe as YAML has it: mappings, lists, strings, numbers.

    Raises RecipeError for an unknown step or field, and for a value that is not allowed.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"recipe: got {type(data).__name__}; allowed: a mapping with `steps`")
    _check_fields("recipe", data, Recipe)
    for section, kind in (("calibration", Calibration), ("evaluation", Evaluation)):
        _check_fields(section, data.get(section, {}), kind)
    steps = data.get("steps", [])
    for index, step in enumerate(steps if isinstance(steps, list) else []):
        _check_step(f"steps[{index}]", step)
    try:
        return msgspec.convert(data, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(_explain(str(error), data)) from error


def check_recipe(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raises RecipeError if a step is impossible with a model of this config, or after those before it."""
    kinds: dict[str, WeightKind] = dict.fromkeys(_linears(MetaModel.of(config)), "dense")
    for index, step in enumerate(recipe.steps):
        where = f"steps[{index}] ({step.name})"
        try:
            step.check(config)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
        selected = [name for name in kinds if step.selects(name)]
        targets = getattr(step, "targets", ())
        if targets and not selected:
            some = ", ".join(list(kinds)[:7])
            raise RecipeError(
                f"{where}: targets: got {', '.join(targets)}, which match no linear; there are {some}, ..."
            )
        for name in selected:
            if kinds[name] not in step.accepts:
                raise RecipeError(
                    f"{where}: {name} is left {kinds[name]} by a step before; allowed here: "
                    f"{', '.join(sorted(step.accepts))}. Put this step first, or give it other `targets`"
                )
            kinds[name] = step.produces or kinds[name]
        config = step.config_after(config)
        kinds = {name: kinds[name] for name in _linears(MetaModel.of(config))}


def _linears(meta_model: MetaModel) -> list[str]:
    return [
        f"{meta_model.prefix}{index}.{name}"
        for index in range(meta_model.num_layers)
        for name in meta_model.linears(index)
    ]


def _check_step(where: str, step: object) -> None:
    if not isinstance(step, Mapping):
        raise RecipeError(f"{where}: got {step!r}; allowed: a mapping with `step`")
    name = step.get("step")
    if name not in STEPS:
        raise RecipeError(f"{where}.step: got {name!r}; allowed: {', '.join(STEPS)}")
    _check_fields(f"{where} ({name})", step, STEPS[name], "step")


def _check_fields(where: str, data: object, kind: type[Struct], *more: str) -> None:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: got {data!r}; allowed: a mapping")
    allowed = [*more, *(field.encode_name for field in msgspec.structs.fields(kind))]
    unknown = [str(name) for name in data if name not in allowed]
    if unknown:
        raise RecipeError(f"{where}: unknown field {', '.join(unknown)}; allowed: {', '.join(allowed)}")


def _explain(message: str, data: object) -> str:
    """msgspec's sentence says what is allowed and where; this adds what came."""
    match = re.search(r"^(.*) - at `\$(.*)`$", message)
    if match is None:
        return f"recipe: {message}"
    found: Any = data
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", match[2]):
        found = found[key] if key else found[int(index)]
    return f"{match[2].lstrip('.')}: got {found!r}; {match[1][0].lower()}{match[1][1:]}"


def preset(name: str) -> Recipe:
    """One of PRESETS. Raises RecipeError for another name."""
    if name not in PRESETS:
        raise RecipeError(f"preset: got {name!r}; allowed: {', '.join(PRESETS)}")
    return parse_recipe(PRESETS[name])


PRESETS: dict[str, dict[str, Any]] = {
    "int4": {"steps": [{"step": "gptq", "bits": 4, "group_size": 64}]},
    "int8": {"steps": [{"step": "round", "bits": 8, "group_size": 64}]},
    "2of4": {"steps": [{"step": "sparsegpt", "pattern": "2:4"}]},
    "w8a8": {"steps": [{"step": "w8a8"}]},
    "nf4": {"steps": [{"step": "codebook"}]},
    "lowrank": {"steps": [{"step": "low_rank", "parameters": 0.8}]},
    "small": {
        "steps": [
            {"step": "structure", "parameters": 0.2},
            {"step": "distill", "minutes": 30, "next_token": 0.3},
        ]
    },
}
"""Recipes by name, as YAML would have them."""
