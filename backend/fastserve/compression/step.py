"""What a recipe is made of: steps, each of which turns the state of a model into the next one."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec
import torch
from torch import Tensor
from transformers import PretrainedConfig

from fastserve_kernels.formats import Weight

if TYPE_CHECKING:
    from rich.progress import Progress

    from fastserve.compression.layer import Layer
    from fastserve.compression.state import State, StateWriter


Kind = Literal["dense", "sparse", "low rank", "codes"]
"""What a linear is between two steps, roughly: `Dense`; `Sparse24`, `Bitmap` or `BlockSparse`; `LowRank`; any
format of fewer bits."""


class RecipeError(ValueError):
    """A recipe that cannot be followed; the sentence names step and field, what came and what is allowed."""


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


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="step"):
    """An entry of a recipe. A subclass has a tag, which is its name there, and fields."""

    takes: ClassVar[frozenset[Kind]] = frozenset(("dense", "sparse", "low rank"))
    """What the linears that it changes may be. None takes codes: that would undo the step that made them."""
    leaves: ClassVar[Kind | None] = None
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

    def sketch(self, weight: Weight, dtype: torch.dtype) -> Weight | None:
        """A weight in the format in which this step leaves one like the given: its size is right, its values
        are of no use. `dtype` is that of dense weights. None: what size it will be, only the run can tell."""
        return weight

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        """Writes the next state, whole. What `after` already holds of an interrupted run is gone on from."""
        raise NotImplementedError


class LayerStep(Step, frozen=True, kw_only=True):
    """A step that takes one decoder layer at a time, first to last.

    The hidden states that reach a layer are those of the layers already compressed, so that a step can make
    up for the errors made before it.
    """

    targets: tuple[str, ...] = ("*",)
    """Which linears: patterns of full names as a shell has them, as in `model.layers.3.mlp.down_proj`."""

    with_reference: ClassVar[bool] = False
    """Whether `compress` looks at the hidden states of the model before this step too."""
    weighs_tokens: ClassVar[bool] = False
    """Whether a token counts by how much predictions depend on a linear's output for it (`importance`)."""

    def selects(self, linear: str) -> bool:
        """Whether the linear of this full name is among the targets."""
        return any(fnmatchcase(linear, pattern) for pattern in self.targets)

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        from fastserve.compression.layer_runner import run_layers

        run_layers(self, before, after, context)

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        """Replaces the weights of the linears of these local names (`mlp.down_proj`) of the layer."""
        raise NotImplementedError
