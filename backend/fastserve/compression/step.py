"""What a recipe is made of: steps, each of which turns the state of a model into the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import msgspec
import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.state.model_state import State, StateWriter
from fastserve_kernels.formats import Weight

WeightKind = Literal["dense", "sparse", "low rank", "quantized"]
"""What a linear is between two steps, roughly: `Dense`; `Sparse24`, `Bitmap` or `BlockSparse`; `LowRank`; any
format of fewer bits."""


@dataclass(frozen=True)
class Context:
    """What all steps of a run share."""

    source: State
    """The model as it came; the teacher of what is trained."""
    calibration: Tensor
    """[samples, T] int64: windows of the calibration text, to measure on."""
    training: Tensor
    """[all samples, T] int64: all of them that are not held out."""
    held_out: Tensor
    """[samples, T] int64: windows of it that no step trains on."""
    device: torch.device
    progress: Progress
    seed: int


@dataclass(frozen=True)
class StepNotes:
    """What a step of this name noted for the report, as JSON has it."""

    step: str
    notes: dict[str, Any]


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="step"):
    """An entry of a recipe. A subclass has a tag, which is its name there, and fields."""

    accepts: ClassVar[frozenset[WeightKind]] = frozenset(("dense", "sparse", "low rank"))
    """What the linears that it changes may be. None takes codes: that would undo the step that made them."""
    produces: ClassVar[WeightKind | None] = None
    """What they are afterwards; None: what they were."""
    changes_outer: ClassVar[bool] = False
    """Whether it is the embedding and the head that it changes."""

    @property
    def name(self) -> str:
        """As a recipe spells it."""
        return str(type(self).__struct_config__.tag)

    def selects(self, linear: str) -> bool:
        """Whether it changes the linear of this full name."""
        return True

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError for what is impossible with a model of this config."""

    def config_after(self, config: PretrainedConfig) -> PretrainedConfig:
        """That of the model afterwards, of whose size the run may decide a little."""
        return config

    def dummy_output(self, weight: Weight, dtype: torch.dtype) -> Weight | None:
        """A weight in the format in which this step leaves one like the given: its size is right, its values
        are of no use. `dtype` is that of dense weights. None: what size it will be, only the run can tell."""
        return weight

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        """Writes the next state, whole. What `after` already holds of an interrupted run is gone on from."""
        raise NotImplementedError
