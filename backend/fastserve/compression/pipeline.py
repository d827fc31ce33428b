"""Compression from a model and a recipe to a checkpoint: each step turns one state into the next."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import msgspec
import torch
from rich.progress import Progress

from fastserve.atomic_write import write_bytes, write_errors
from fastserve.checkpoints.model_files import ModelFiles
from fastserve.compression.errors import RecipeError
from fastserve.compression.recipe import Recipe, check_recipe
from fastserve.compression.state.export import export
from fastserve.compression.state.model_state import SavedState, State, StateWriter
from fastserve.compression.state.source_state import SourceState
from fastserve.compression.step import Context, Step, StepNotes
from fastserve.corpus.windows import calibration_windows

PARTIAL = ".partial"
"""Added to the name of the result's directory: where an unfinished run keeps its states."""
RUN = "run.json"


def compress(
    files: ModelFiles,
    recipe: Recipe,
    out: Path,
    device: torch.device,
    progress: Progress,
    restart: bool = False,
) -> list[StepNotes]:
    """Writes the compressed checkpoint to `out`, which must not exist yet, and returns what each step noted.

    An interrupted run of the same recipe on the same model is gone on from, layer by layer; `restart` begins
    anew. Raises RecipeError, TextError for calibration text that cannot be used, ModelError if the model
    cannot be read, and WriteError on a full disk, after which the same call goes on.
    """
    source = load_source(files, recipe, out)
    work = out.with_name(out.name + PARTIAL)
    _open_work_directory(work, _digest(recipe, source), restart)
    text = calibration_windows(recipe.calibration, files.tokenizer, recipe.seed)
    context = Context(source, text.measured, text.training, text.held_out, device, progress, recipe.seed)
    state: State = source
    notes: list[StepNotes] = []
    for number, step in enumerate(recipe.steps, start=1):
        saved = _run(step, work / f"{number}-{step.name}", state, context)
        notes.append(StepNotes(step.name, saved.notes))
        state = saved
    export(state, files.tokenizer, out)
    shutil.rmtree(work)
    return notes


def load_source(files: ModelFiles, recipe: Recipe, out: Path) -> SourceState:
    """The model as it came, checked against the recipe.

    Raises RecipeError if the recipe cannot be followed with it, or `out` exists; ModelError if the model
    cannot be read.
    """
    if out.exists():
        raise RecipeError(f"out: {out} exists already; name a directory that does not")
    source = SourceState(files.checkpoint)
    check_recipe(recipe, source.config)
    return source


def _run(step: Step, directory: Path, before: State, context: Context) -> SavedState:
    """The state after a step; read, not computed, if an interrupted run came so far."""
    after = StateWriter(directory)
    if not after.is_finished:
        torch.manual_seed(context.seed)
        step.run(before, after, context)
        after.finish()
    return SavedState(directory)


def _digest(recipe: Recipe, source: SourceState) -> str:
    """A hash of what the result depends on: the recipe and the model."""
    return hashlib.sha256(msgspec.json.encode(recipe) + source.digest().encode()).hexdigest()


def _open_work_directory(work: Path, digest: str, restart: bool) -> None:
    """Makes the directory of the states. Raises RecipeError if it holds an unfinished run of something
    else."""
    if restart:
        shutil.rmtree(work, ignore_errors=True)
    if not (work / RUN).is_file():
        shutil.rmtree(work, ignore_errors=True)
        with write_errors(work):
            work.mkdir(parents=True)
        write_bytes(work / RUN, msgspec.json.encode({"digest": digest}))
    elif msgspec.json.decode((work / RUN).read_bytes())["digest"] != digest:
        raise RecipeError(
            f"out: {work} holds an unfinished run of another recipe or model; finish that, or begin anew "
            "(--restart)"
        )
