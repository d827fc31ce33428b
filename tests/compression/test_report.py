"""The report: from notes to figures, to JSON and back, and in the terminal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from fastserve.benchmark.machine import machine
from fastserve.compression.calibration.linear_report import LinearReport
from fastserve.compression.report.report import (
    ModelFigures,
    Report,
    by_kind,
    bytes_on_disk,
    step_reports,
    terminal_report,
    versions,
    whole_rows,
    write_report,
)
from fastserve.compression.step import StepNotes
from fastserve.compression.training.trainer import CurvePoint


def test_the_linears_of_all_layers_come_in_the_order_of_the_layers() -> None:
    notes = {f"layer {index}": [linear(index)] for index in (10, 2, 0)}
    (step,) = step_reports([StepNotes("gptq", notes)])
    assert [found.name for found in step.linears] == [linear(index)["name"] for index in (0, 2, 10)]
    assert step.linears[0] == LinearReport(**linear(0))
    assert step.notes == {}


def test_a_curve_is_told_from_other_notes() -> None:
    point = {"step": 1, "tokens": 64, "minutes": 0.5, "training": None, "held_out": 3.25}
    (step,) = step_reports([StepNotes("distill", {"losses": [point], "ranks": {"a": 4}, "layer norms": 1})])
    assert step.curve == [CurvePoint(**point)]  # type: ignore[arg-type]
    assert step.notes == {"ranks": {"a": 4}, "layer norms": 1}


def test_what_is_written_is_read_back_whole(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=Report) == report


def test_size_on_disk_is_that_of_the_weights(tmp_path: Path) -> None:
    for name, size in (("model-1.safetensors", 100), ("model-2.safetensors", 20), ("config.json", 7)):
        (tmp_path / name).write_bytes(bytes(size))
    assert bytes_on_disk(tmp_path) == 120
    assert bytes_on_disk(tmp_path / "config.json") == 7


def test_changes_are_relative_to_the_model_before(report: Report) -> None:
    rows = {row[0]: row[1:] for row in whole_rows(report)}
    assert rows["size on disk, MB"] == ("2.0", "1.0", "-50.00%")
    assert rows["perplexity"] == ("20.000", "21.000", "+5.00%")
    assert rows["tokens/s, batch 16"] == ("100.0", "150.0", "+50.00%")
    assert rows["top-1 agreement"] == ("", "90.00%", "")


def test_what_was_not_measured_is_not_shown(report: Report) -> None:
    bare = dataclasses.replace(
        report, before=ModelFigures(2), after=ModelFigures(1), kl=None, top1_agreement=None
    )
    assert [row[0] for row in whole_rows(bare)] == ["size on disk, MB"]


def test_the_terminal_shows_a_line_for_each_kind_of_linear(report: Report) -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_report(report))
    text = console.export_text()
    assert "4 x mlp.down_proj" in text
    assert "4 x self_attn.q_proj" in text
    assert "+5.00%" in text


def test_kinds_keep_the_order_of_the_layers(report: Report) -> None:
    kinds = by_kind(report.steps[0].linears)
    assert list(kinds) == ["mlp.down_proj", "self_attn.q_proj"]
    assert [found.name.split(".")[2] for found in kinds["mlp.down_proj"]] == ["0", "1", "2", "3"]


def test_the_machine_and_the_versions_are_named() -> None:
    assert "cores" in machine()
    assert set(versions()) == {"python", "fastserve", "torch", "transformers"}


def linear(layer: int, kind: str = "mlp.down_proj", **changes: Any) -> dict[str, Any]:
    """A note of a linear."""
    return {
        "name": f"model.layers.{layer}.{kind}",
        "format": "Int4",
        "bits": 4.25,
        "sparsity": 0.0,
        "rank": None,
        "weight_error": 0.1,
        "output_error": 0.05 + 0.01 * layer,
        **changes,
    }


@pytest.fixture
def report() -> Report:
    notes = {
        f"layer {index}": [linear(index), linear(index, "self_attn.q_proj", rank=8)] for index in range(4)
    }
    return Report(
        model="original",
        result="out/small",
        recipe={"steps": [{"step": "gptq"}]},
        before=ModelFigures(2_000_000, 900_000, 20.0, {"1": 10.0, "16": 100.0}),
        after=ModelFigures(1_000_000, 500_000, 21.0, {"1": 12.0, "16": 150.0}),
        kl=0.01,
        top1_agreement=0.9,
        evaluated_tokens=5110,
        steps=step_reports([StepNotes("gptq", notes)]),
        machine="a processor",
        versions={"python": "3.11"},
        date="2026-11-21T15:00:00+00:00",
        seconds=12.5,
    )
