"""Steps: what a recipe is made of. Each turns the state of a model into the next one."""

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
"""The kind of a linear's weight between two steps: `Dense`; `Sparse24`, `Bitmap` or `BlockSparse`; `LowRank`;
any format of fewer bits."""


@dataclass(frozen=True)
class Context:
    """The inputs that all steps of a run share."""

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
    """The notes of a step of this name for the report, as JSON has them."""

    step: str
    notes: dict[str, Any]


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="step"):
    """An entry of a recipe. A subclass has a tag, which is its name there, and fields."""

    accepts: ClassVar[frozenset[WeightKind]] = frozenset(("dense", "sparse", "low rank"))
    """Kinds of weights that the step can change. None takes quantized ones: that would undo the
    quantization."""
    produces: ClassVar[WeightKind | None] = None
    """The kind of the weights that it changed; None: as before."""
    changes_outer: ClassVar[bool] = False
    """Whether the step changes the embedding and the head."""

    @property
    def name(self) -> str:
        """The name of the step in a recipe."""
        return str(type(self).__struct_config__.tag)

    def selects(self, linear: str) -> bool:
        """Whether the step changes the linear of this full name, `model.layers.3.mlp.down_proj`."""
        return True

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError for what is impossible with a model of this config."""

    def config_after(self, config: PretrainedConfig) -> PretrainedConfig:
        """The config of the model after the step. Sizes that the run chooses are approximate in it."""
        return config

    def dummy_output(self, weight: Weight, dtype: torch.dtype) -> Weight | None:
        """A dummy weight in the format that this step turns `weight` into: of the right size, without
        meaning.

        `dtype` is that of dense weights. None: only the run can tell the size.
        """
        return weight

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        """Writes the whole next state; goes on from what `after` holds of an interrupted run."""
        raise NotImplementedError
