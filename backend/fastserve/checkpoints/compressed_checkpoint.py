"""A Hugging Face directory whose weights are quantized or sparse, in one of the layouts that tools write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.safetensors_checkpoint import SafetensorsCheckpoint
from fastserve.checkpoints.weight_shards import shard_rows
from fastserve_kernels.formats import Weight


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of one module of a checkpoint, each read when it is asked for."""

    name: str
    """`model.layers.0.mlp.up_proj`."""
    shapes: Mapping[str, tuple[int, ...]]
    """By the parameter's name within the module: `weight_packed`."""
    files: SafetensorsCheckpoint

    def shape(self, parameter: str) -> tuple[int, int]:
        """The rows and columns of a matrix. Raises ValueError if there is none of this name."""
        if len(self.shapes.get(parameter, ())) != 2:
            raise ValueError(f"{parameter} is missing or no matrix; found {dict(self.shapes)}")
        rows, columns = self.shapes[parameter]
        return rows, columns

    def tensor(self, parameter: str) -> Tensor:
        """A parameter as the file holds it. Raises ValueError if there is none of this name."""
        if parameter not in self.shapes:
            raise ValueError(f"{parameter} is missing; found {', '.join(self.shapes)}")
        return self.files.tensor(f"{self.name}.{parameter}")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the weight: a bias is an ordinary tensor."""
        return {parameter: self.tensor(parameter) for parameter in self.shapes if parameter != "bias"}

    def check_names(self, *known: str) -> None:
        """Raises ValueError if the weight has other tensors than these."""
        unknown = self.shapes.keys() - {*known, "bias"}
        if unknown:
            raise ValueError(f"tensors of these names have no meaning here: {', '.join(sorted(unknown))}")


class Layout(Protocol):
    """How a tool stores a quantized or sparse weight: as several tensors of its module."""

    def applies_to(self, module: ModuleTensors) -> bool:
        """Whether the weight of a module is stored in this layout, rather than as an ordinary tensor."""

    def weight_shape(self, module: ModuleTensors) -> tuple[int, int]:
        """[N, K] of a weight in this layout. Raises ValueError if its tensors do not tell."""

    def load_weight(self, module: ModuleTensors) -> Weight:
        """A weight in this layout as one of our formats, code for code.

        Raises ValueError if its tensors are wrong, or if no format of ours holds it.
        """


class CompressedCheckpoint:
    """A `Checkpoint`: each stored weight appears as the one tensor that it stands for."""

    def __init__(self, files: SafetensorsCheckpoint, layout: Layout) -> None:
        """Raises ModelError if a weight lacks what tells its shape."""
        self._files = files
        self._layout = layout
        self._stored = {
            f"{module.name}.weight": module for module in _modules(files) if layout.applies_to(module)
        }
        taken = {
            f"{module.name}.{parameter}"
            for module in self._stored.values()
            for parameter in module.shapes
            if parameter != "bias"
        }
        self._plain = [name for name in files.shapes if name not in taken]
        self.shapes: dict[str, tuple[int, ...]] = {name: files.shapes[name] for name in self._plain}
        for name, module in self._stored.items():
            try:
                self.shapes[name] = layout.weight_shape(module)
            except ValueError as error:
                raise ModelError(f"{module.name}: {error}") from error

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the largest ordinary tensor. Raises ModelError if we do not compute in it."""
        return self._files.dtype_of(self._plain)

    def read(self, name: str, destination: Tensor, rows: range | None = None) -> None:
        """See `Checkpoint`."""
        weight = self.read_packed(name, exact=True, rows=rows)
        if weight is None:
            self._files.read(name, destination, rows)
        else:
            destination.copy_(weight.dequantize())

    def read_packed(self, name: str, exact: bool, rows: range | None = None) -> Weight | None:
        """A matrix, or some rows of it, in the format in which the file holds it, to the bit; None for
        ordinary tensors.

        Raises ModelError if its tensors are wrong, or if no format of ours holds it.
        """
        if name not in self._stored:
            return None
        module = self._stored[name]
        try:
            weight = self._layout.load_weight(module)
        except ValueError as error:
            raise ModelError(f"{module.name}: {error}") from error
        return weight if rows is None else shard_rows(weight, rows)


def _modules(files: SafetensorsCheckpoint) -> list[ModuleTensors]:
    shapes_of: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in files.shapes.items():
        module, _, parameter = name.rpartition(".")
        shapes_of.setdefault(module, {})[parameter] = shape
    return [ModuleTensors(module, shapes, files) for module, shapes in shapes_of.items()]
