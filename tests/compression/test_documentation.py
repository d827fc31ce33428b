"""docs/compression.md names every step, every field and every preset."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fastserve.compression.recipe import PRESETS, Recipe, read_recipe
from fastserve.compression.step import Step
from fastserve.compression.steps import STEPS
from fastserve.corpus.sources import Calibration, Evaluation

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "compression.md").read_text(encoding="utf-8")
RECIPES = sorted((DOCS / "recipes").glob("*.yaml"))


def fields(kind: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(kind)]


@pytest.mark.parametrize(("name", "kind"), STEPS.items())
def test_every_step_has_a_paragraph_and_its_fields_are_named(name: str, kind: type[Step]) -> None:
    assert f"\n`{name}`. " in TEXT
    assert [field for field in fields(kind) if f"`{field}`" not in TEXT and f"`{field}: " not in TEXT] == []


@pytest.mark.parametrize("kind", [Calibration, Evaluation, Recipe])
def test_every_field_of_a_recipe_is_named(kind: type[msgspec.Struct]) -> None:
    assert [field for field in fields(kind) if f"`{field}`" not in TEXT and f"{field}:" not in TEXT] == []


def test_every_preset_is_named() -> None:
    assert [name for name in PRESETS if f"`{name}`" not in TEXT] == []


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_can_be_read_and_is_in_the_figures(file: Path) -> None:
    assert read_recipe(file).steps
    assert f"`{file.stem}`" in TEXT
