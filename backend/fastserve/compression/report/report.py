"""The report: the effect of compression on a model, layer by layer and as a whole."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Column, Table

from fastserve.atomic_write import write_bytes
from fastserve.compression.calibration.linear_report import LinearReport
from fastserve.compression.step import StepNotes
from fastserve.compression.training.trainer import CurvePoint

FILE = "report.json"
LAYER, CURVE = "layer ", "losses"
"""Keys of notes: `layer 3` holds the linears of a layer, `losses` the points of training."""
_PACKAGES = ("fastserve", "torch", "transformers")


@dataclass(frozen=True)
class StepReport:
    """The effect of a step."""

    step: str
    linears: list[LinearReport]
    """The linears that the step changed, first layer to last."""
    curve: list[CurvePoint]
    """The training curve, if the step trained."""
    notes: dict[str, Any]
    """Everything else that the step noted."""


@dataclass(frozen=True)
class ModelFigures:
    """A whole model; None: not measured."""

    bytes_on_disk: int
    bytes_per_token: int | None = None
    """Bytes of weights that one token of a lone sequence reads."""
    perplexity: float | None = None
    tokens_per_second: dict[str, float] | None = None
    """Output tokens per second by batch size."""


@dataclass(frozen=True)
class Report:
    """The report of a run of `fastserve compress`."""

    model: str
    result: str
    recipe: dict[str, Any]
    before: ModelFigures
    after: ModelFigures
    kl: float | None
    """KL(before || after) in nats per token of the evaluation text."""
    top1_agreement: float | None
    """Share of its tokens where both think the same next token the likeliest."""
    evaluated_tokens: int
    steps: list[StepReport]
    machine: str
    versions: dict[str, str]
    date: str
    """When it was finished, ISO 8601."""
    seconds: float
    """Seconds that the steps took, in this run."""


def step_reports(notes: list[StepNotes]) -> list[StepReport]:
    """The reports of the steps, from their notes."""
    return [_step_report(note.step, note.notes) for note in notes]


def _step_report(step: str, notes: Mapping[str, Any]) -> StepReport:
    layers = sorted((int(key.removeprefix(LAYER)), value) for key, value in notes.items() if _is_layer(key))
    linears = [linear for _, found in layers for linear in found]
    rest = {key: value for key, value in notes.items() if key != CURVE and not _is_layer(key)}
    return StepReport(
        step=step,
        linears=msgspec.convert(linears, list[LinearReport]),
        curve=msgspec.convert(notes.get(CURVE, []), list[CurvePoint]),
        notes=rest,
    )


def _is_layer(key: str) -> bool:
    return key.startswith(LAYER) and key.removeprefix(LAYER).isdigit()


def bytes_on_disk(checkpoint: Path) -> int:
    """The size of a GGUF file, or of a directory's safetensors."""
    if checkpoint.is_file():
        return checkpoint.stat().st_size
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that figures depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def write_report(report: Report, directory: Path) -> None:
    """Writes `report.json`, which `msgspec.json.decode(..., type=Report)` reads back."""
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=1)
    write_bytes(directory / FILE, encoded + b"\n")


def kind_of(name: str) -> str:
    """The kind of a linear: `mlp.down_proj` of `model.layers.3.mlp.down_proj`."""
    return ".".join(name.split(".")[-2:])


def by_kind(linears: list[LinearReport]) -> dict[str, list[LinearReport]]:
    """The linears of each kind, in the order of the layers."""
    kinds: dict[str, list[LinearReport]] = defaultdict(list)
    for linear in linears:
        kinds[kind_of(linear.name)].append(linear)
    return dict(kinds)


def terminal_report(report: Report) -> RenderableType:
    """The whole model before and after, and each step's linears by kind."""
    return Group(_whole_table(report), *(_step_table(step) for step in report.steps if step.linears))


def whole_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """The figures of the whole model: name, before, after, and how they compare."""
    before, after = report.before, report.after
    rows = [
        _row("size on disk, MB", before.bytes_on_disk / 1e6, after.bytes_on_disk / 1e6, "{:.1f}"),
        _row(
            "weights read per token, MB",
            _mega(before.bytes_per_token),
            _mega(after.bytes_per_token),
            "{:.1f}",
        ),
        _row("perplexity", before.perplexity, after.perplexity, "{:.3f}"),
    ]
    for batch, speed in (after.tokens_per_second or {}).items():
        old = (before.tokens_per_second or {}).get(batch)
        rows.append(_row(f"tokens/s, batch {batch}", old, speed, "{:.1f}"))
    rows = [row for row in rows if row[2]]
    if report.kl is not None and report.top1_agreement is not None:
        rows.append(("KL to the original, nats/token", "", f"{report.kl:.5f}", ""))
        rows.append(("top-1 agreement", "", f"{report.top1_agreement:.2%}", ""))
    return rows


def _row(name: str, before: float | None, after: float | None, form: str) -> tuple[str, str, str, str]:
    shown = ["" if value is None else form.format(value) for value in (before, after)]
    change = "" if before is None or after is None else f"{after / before - 1:+.2%}"
    return name, shown[0], shown[1], change


def _mega(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _whole_table(report: Report) -> Table:
    table = Table("", "before", "after", "change", title=Path(report.result).name)
    for row in whole_rows(report):
        table.add_row(*row)
    return table


def _step_table(step: StepReport) -> Table:
    table = Table(
        Column("linears", no_wrap=True),
        "format",
        "bits",
        "sparsity",
        "rank",
        "weight error",
        "output error",
        title=step.step,
    )
    for kind, linears in by_kind(step.linears).items():
        table.add_row(
            f"{len(linears)} x {kind}",
            ", ".join(sorted({linear.format for linear in linears})),
            _mean([linear.bits for linear in linears], "{:.2f}"),
            _mean([linear.sparsity for linear in linears], "{:.1%}"),
            _mean([linear.rank for linear in linears], "{:.0f}"),
            _mean([linear.weight_error for linear in linears], "{:.4f}"),
            _mean([linear.output_error for linear in linears], "{:.4f}"),
        )
    return table


def _mean(values: list[Any], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(sum(known) / len(known)) if known else ""
