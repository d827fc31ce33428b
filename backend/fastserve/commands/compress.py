"""`fastserve compress MODEL`: a smaller checkpoint, and a report of what that cost."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fastserve import heap
from fastserve.atomic_write import WriteError
from fastserve.benchmark.machine import machine
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_files import ModelFiles, locate
from fastserve.compression.errors import RecipeError
from fastserve.compression.pipeline import compress, load_source
from fastserve.compression.recipe import PRESETS, Recipe, preset, read_recipe
from fastserve.compression.report.report import (
    ModelFigures,
    Report,
    bytes_on_disk,
    step_reports,
    terminal_report,
    versions,
    write_report,
)
from fastserve.compression.report.report_page import write_page
from fastserve.compression.report.size_estimate import estimated_bytes
from fastserve.compression.report.speed import bytes_per_token, measure_speeds
from fastserve.corpus.sources import Evaluation
from fastserve.corpus.windows import TextError, evaluation_windows
from fastserve.engine.engine_loader import choose_device
from fastserve.engine.kv_scales import choose_kv_cache
from fastserve.evaluation.evaluation import Quality, evaluate
from fastserve.models.model_loader import load_model

Extent = Literal["full", "quick", "none"]
"""How much is evaluated."""
QUICK_TOKENS = 2048
"""Four windows from all over the text, seconds where all of it takes minutes. The standard error of KL is 5 %
then (SmolLM2, 4 and 8 bits; docs/compression.md)."""
ERRORS = (ModelError, RecipeError, TextError, WriteError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `fastserve compress`."""
    parser.add_argument(
        "model", nargs="?", default="", help="directory, GGUF file or hub name (default: the default model)"
    )
    recipe = parser.add_mutually_exclusive_group(required=True)
    recipe.add_argument(
        "--recipe", type=Path, metavar="FILE", help="the steps, in YAML (docs/compression.md)"
    )
    recipe.add_argument("--preset", choices=PRESETS, help="a recipe that comes with FastServe")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="of the result; must not exist yet"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--calibration",
        nargs="+",
        metavar="FILE",
        help="text to measure and train on, in place of the recipe's",
    )
    parser.add_argument(
        "--evaluation", nargs="+", metavar="FILE", help="text to judge by, in place of the recipe's"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="windows of calibration text, in place of the recipe's"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="random seed, in place of the recipe's")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew, not where an interrupted run was stopped"
    )
    parser.add_argument(
        "--evaluate",
        choices=get_args(Extent),
        default="quick",
        help=f"perplexity, KL and tokens/s in the report: on all the evaluation text of the recipe, on "
        f"{QUICK_TOKENS} tokens of it, or not at all (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compresses, reports, evaluates, and reports again."""
    recipe = recipe_of(arguments)
    files, out = locate(arguments.model), arguments.out
    device = choose_device(arguments.device)
    source = load_source(files, recipe, out)
    print(_size_line(bytes_on_disk(files.checkpoint), estimated_bytes(recipe, source)), file=sys.stderr)
    with _progress() as progress:
        started = time.monotonic()
        with _advice("make room, and the same command goes on where it was"):
            notes = compress(files, recipe, out, device, progress, arguments.restart)
        report = Report(
            model=str(files.checkpoint),
            result=str(out),
            recipe=msgspec.to_builtins(recipe),
            before=ModelFigures(bytes_on_disk(files.checkpoint)),
            after=ModelFigures(bytes_on_disk(out)),
            kl=None,
            top1_agreement=None,
            evaluated_tokens=0,
            steps=step_reports(notes),
            machine=machine(),
            versions=versions(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=time.monotonic() - started,
        )
        with _advice(f"the checkpoint in {out} is whole and can be served, only its report is not there"):
            _write(report, out)
            if arguments.evaluate != "none":
                evaluation = evaluation_of(recipe, arguments.evaluate)
                report = with_figures(report, evaluation, files, device, progress)
                _write(report, out)
    console = Console()
    console.print(terminal_report(report))
    console.print(f"Wrote {out}, with report.json and report.html. Serve it: fastserve serve --model {out}")
    return 0


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe, with what the command line says otherwise. Raises RecipeError."""
    recipe = preset(arguments.preset) if arguments.preset else read_recipe(arguments.recipe)
    calibration: dict[str, Any] = {}
    if arguments.calibration:
        calibration["files"] = tuple(arguments.calibration)
    if arguments.samples is not None:
        calibration["samples"] = arguments.samples
    changed: dict[str, Any] = {"calibration": msgspec.structs.replace(recipe.calibration, **calibration)}
    if arguments.evaluation:
        changed["evaluation"] = msgspec.structs.replace(recipe.evaluation, files=tuple(arguments.evaluation))
    if arguments.seed is not None:
        changed["seed"] = arguments.seed
    recipe = msgspec.structs.replace(recipe, **changed)
    try:
        return msgspec.convert(msgspec.to_builtins(recipe), Recipe)  # checks what `replace` does not
    except msgspec.ValidationError as error:
        raise RecipeError(f"--samples, --seed: {error}") from error


def evaluation_of(recipe: Recipe, extent: Extent) -> Evaluation:
    """What the recipe says, or no more than QUICK_TOKENS of it."""
    if extent == "full":
        return recipe.evaluation
    tokens = min(recipe.evaluation.tokens or QUICK_TOKENS, QUICK_TOKENS)
    return msgspec.structs.replace(recipe.evaluation, tokens=tokens)


def with_figures(
    report: Report, evaluation: Evaluation, files: ModelFiles, device: torch.device, progress: Progress
) -> Report:
    """The report with perplexity, the distance to the original, and tokens per second."""
    heap.trim()
    quality = _quality(evaluation, files, report.result, device, progress)
    heap.trim()
    speeds = measure_speeds({"before": report.model, "after": report.result}, files.tokenizer, progress)
    per_batch = {
        name: {str(batch): speed for batch, speed in of_model.items()} for name, of_model in speeds.items()
    }
    return dataclasses.replace(
        report,
        before=ModelFigures(
            report.before.bytes_on_disk,
            bytes_per_token(load_model(report.model, device=device, one_layer_at_a_time=True)),
            quality.reference_perplexity,
            per_batch["before"],
        ),
        after=ModelFigures(
            report.after.bytes_on_disk,
            bytes_per_token(load_model(report.result, device=device, one_layer_at_a_time=True)),
            quality.perplexity,
            per_batch["after"],
        ),
        kl=quality.kl,
        top1_agreement=quality.top1_agreement,
        evaluated_tokens=quality.tokens,
    )


def _quality(
    evaluation: Evaluation, files: ModelFiles, result: str, device: torch.device, progress: Progress
) -> Quality:
    """The quality of the result, beside the original."""
    windows = evaluation_windows(evaluation, files.tokenizer)
    before, after = (
        load_model(path, "float32", device, one_layer_at_a_time=True)
        for path in (str(files.checkpoint), result)
    )
    kv_cache = choose_kv_cache("auto", locate(result), after)
    heap.trim()
    return evaluate(after, before, windows, progress, kv_cache)


def _size_line(before: int, after: int | None) -> str:
    """What is known of the result's size before it is made."""
    line = f"Size: {before / 1e6:.1f} MB before"
    if after is None:
        return f"{line}; how large the result will be, this recipe decides as it runs"
    line = f"{line}, about {after / 1e6:.1f} MB after ({after / before - 1:+.0%})"
    if after <= before:
        return line
    return f"{line}: the result will be LARGER, for the model's weights have fewer bits than this recipe's"


@contextmanager
def _advice(words: str) -> Iterator[None]:
    """Adds to a WriteError what is left, and what to do."""
    try:
        yield
    except WriteError as error:
        raise WriteError(f"{error}; {words}") from error


def _write(report: Report, out: Path) -> None:
    write_report(report, out)
    write_page(report, out)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
