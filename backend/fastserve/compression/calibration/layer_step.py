"""Layer-by-layer compression: a step takes one decoder layer at a time, and an interrupted run can go on.

After each layer two files are written: the layer, and the hidden states before the next one. To go on is to
read the latter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastserve import heap
from fastserve.compression.calibration.importance import Importance, measure_importance
from fastserve.compression.calibration.layer import Layer
from fastserve.compression.calibration.layer_forward import LayerForward
from fastserve.compression.calibration.linear_report import linear_report
from fastserve.compression.state.meta_model import EMBEDDING, MetaModel
from fastserve.compression.state.model_state import SCRATCH, State, StateWriter, read_part, write_part
from fastserve.compression.step import Context, Step
from fastserve_kernels.formats import Dense, Weight

REPORT_TOKENS = 4096
"""Tokens whose activations a step without calibration is reported by."""
HIDDEN = f"{SCRATCH}hidden.safetensors"


class LayerStep(Step, frozen=True, kw_only=True):
    """A step that takes one decoder layer at a time, first to last.

    The hidden states that reach a layer are those of the layers already compressed, so that a step can make
    up for the errors made before it.
    """

    targets: tuple[str, ...] = ("*",)
    """The linears that the step changes: shell patterns of full names such as
    `model.layers.3.mlp.down_proj`."""

    with_reference: ClassVar[bool] = False
    """Whether `compress` uses the hidden states of the model before this step too."""
    weights_tokens: ClassVar[bool] = False
    """Whether tokens are weighted by how much predictions depend on a linear's output for them
    (`importance`)."""

    @property
    def measures(self) -> bool:
        """Whether `compress` uses activation statistics. If not, calibration text is run through the layers
        for the report alone, and little of it is enough."""
        return True

    def selects(self, linear: str) -> bool:
        """Whether the linear of this full name is among the targets."""
        return any(fnmatchcase(linear, pattern) for pattern in self.targets)

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        """Compresses layer by layer."""
        run_layers(self, before, after, context)

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        """Replaces the weights of the linears of these local names (`mlp.down_proj`) of the layer."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Position:
    """How far a step has come: the hidden states before layer `index`."""

    index: int
    hidden: Tensor
    reference: Tensor | None


@torch.no_grad()
def run_layers(step: LayerStep, before: State, after: StateWriter, context: Context) -> None:
    """Runs a step over all layers, first to last, and writes the state after it."""
    importance = measure_importance(before, after, context) if step.weights_tokens else None
    meta_model = MetaModel(before.config, context.device)
    windows = context.calibration if step.measures else _few(context.calibration)
    hidden, calls = meta_model.embed(_embedding(before), windows)
    position = _read_position(after) or _Position(0, hidden, hidden.clone() if step.with_reference else None)
    del hidden
    task = context.progress.add_task(step.name, total=before.num_layers, completed=position.index)
    for index in range(position.index, before.num_layers):
        layer = _layer(meta_model, before, index, calls[index], position, importance)
        names = tuple(name for name in meta_model.linears(index) if step.selects(f"{layer.prefix}{name}"))
        step.compress(layer, names)
        reports = [linear_report(layer, name) for name in names]
        layer.advance()
        after.write_layer(index, layer.part)
        after.note(f"layer {index}", [report.__dict__ for report in reports])
        position = _Position(index + 1, position.hidden, position.reference)
        _write_position(after, position)
        del layer
        heap.trim()
        context.progress.advance(task)
    after.write_outer(before.outer())
    after.write_config(before.config)


@torch.no_grad()
def survey_layers(name: str, state: State, context: Context, importance: Importance) -> Iterator[Layer]:
    """The layers of a model as they are, one after the other, with the hidden states that reach them. `name`
    is what the progress bar says."""
    meta_model = MetaModel(state.config, context.device)
    hidden, calls = meta_model.embed(_embedding(state), context.calibration)
    task = context.progress.add_task(name, total=state.num_layers)
    for index in range(state.num_layers):
        layer = _layer(meta_model, state, index, calls[index], _Position(index, hidden, None), importance)
        yield layer
        layer.advance()
        context.progress.advance(task)


def _few(windows: Tensor) -> Tensor:
    """About REPORT_TOKENS of windows [samples, T], from all over the text."""
    count = max(1, REPORT_TOKENS // windows.shape[1])
    return windows[:: max(1, len(windows) // count)][:count]


def _embedding(state: State) -> Tensor:
    weight = state.outer()[EMBEDDING]
    assert isinstance(weight, Weight)
    return weight.weight if isinstance(weight, Dense) else weight.dequantize()


def _layer(
    meta_model: MetaModel,
    before: State,
    index: int,
    call: Mapping[str, Any],
    position: _Position,
    importance: Importance | None,
) -> Layer:
    tensors = before.dense_layer(index)
    calls = LayerForward(meta_model.materialize(index, tensors), dict(call))
    reference = LayerForward(meta_model.materialize(index, tensors), dict(call))
    prefix = f"{meta_model.prefix}{index}."
    counts = None if importance is None else importance.of_layer(prefix)
    return Layer(
        index, prefix, before.layer(index), calls, position.hidden, reference, position.reference, counts
    )


def _read_position(after: StateWriter) -> _Position | None:
    path = after.directory / HIDDEN
    if not path.is_file():
        return None
    part: dict[str, Any] = dict(read_part(path))
    return _Position(int(part["index"]), part["hidden"], part.get("reference"))


def _write_position(after: StateWriter, position: _Position) -> None:
    part: dict[str, Tensor] = {"index": torch.tensor(position.index), "hidden": position.hidden}
    if position.reference is not None:
        part["reference"] = position.reference
    write_part(after.directory / HIDDEN, part)
