"""A Hugging Face directory whose weights are quantized or sparse, in one of the layouts that tools write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.safetensors_checkpoint import SafetensorsCheckpoint
from fastserve_kernels.formats import Weight


@dataclass(frozen=True)
class StoredModule:
    """The tensors of a module, such as `model.layers.0.mlp.up_proj`, each read when it is asked for."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    """By local name: `weight_packed`."""
    files: SafetensorsCheckpoint

    def shape(self, local: str) -> tuple[int, int]:
        """Of a matrix. Raises ValueError if there is none of this name."""
        if len(self.shapes.get(local, ())) != 2:
            raise ValueError(f"{local} is missing or no matrix; found {dict(self.shapes)}")
        rows, columns = self.shapes[local]
        return rows, columns

    def tensor(self, local: str) -> Tensor:
        """Raises ValueError if there is none of this name."""
        if local not in self.shapes:
            raise ValueError(f"{local} is missing; found {', '.join(self.shapes)}")
        return self.files.tensor(f"{self.name}.{local}")

    def tensors(self) -> dict[str, Tensor]:
        """All of the weight: a bias is an ordinary tensor."""
        return {local: self.tensor(local) for local in self.shapes if local != "bias"}

    def check_names(self, *known: str) -> None:
        """Raises ValueError if the weight has other tensors than these."""
        unknown = self.shapes.keys() - {*known, "bias"}
        if unknown:
            raise ValueError(f"tensors of these names have no meaning here: {', '.join(sorted(unknown))}")


class Layout(Protocol):
    """How a tool stores a weight: as several tensors of its module."""

    def holds(self, module: StoredModule) -> bool:
        """Whether the weight of the module is stored so, rather than as an ordinary tensor."""

    def shape(self, module: StoredModule) -> tuple[int, int]:
        """[N, K] of such a weight. Raises ValueError."""

    def weight(self, module: StoredModule) -> Weight:
        """Such a weight in a format of ours. Raises ValueError if there is none for it."""


class CompressedCheckpoint:
    """A `Checkpoint`: each stored weight appears as the one tensor that it stands for."""

    def __init__(self, files: SafetensorsCheckpoint, layout: Layout) -> None:
        """Raises ModelError if a weight lacks what tells its shape."""
        self._files = files
        self._layout = layout
        self._stored = {f"{module.name}.weight": module for module in _modules(files) if layout.holds(module)}
        taken = {
            f"{module.name}.{local}"
            for module in self._stored.values()
            for local in module.shapes
            if local != "bias"
        }
        self._plain = [name for name in files.shapes if name not in taken]
        self.shapes: dict[str, tuple[int, ...]] = {name: files.shapes[name] for name in self._plain}
        for name, module in self._stored.items():
            try:
                self.shapes[name] = layout.shape(module)
            except ValueError as error:
                raise ModelError(f"{module.name}: {error}") from error

    @property
    def dtype(self) -> torch.dtype:
        """That of the largest ordinary tensor. Raises ModelError if that is none in which we compute."""
        return self._files.dtype_of(self._plain)

    def read(self, name: str, destination: Tensor) -> None:
        """Writes a tensor into `destination` of the same shape, converted to its dtype."""
        weight = self.read_packed(name, exact=True)
        if weight is None:
            self._files.read(name, destination)
        else:
            destination.copy_(weight.dequantize())

    def read_packed(self, name: str, exact: bool) -> Weight | None:
        """A matrix in the format in which the file holds it, its scales to the bit; None for numbers."""
        if name not in self._stored:
            return None
        module = self._stored[name]
        try:
            return self._layout.weight(module)
        except ValueError as error:
            raise ModelError(f"{module.name}: {error}") from error


def _modules(files: SafetensorsCheckpoint) -> list[StoredModule]:
    locals_of: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in files.shapes.items():
        module, _, local = name.rpartition(".")
        locals_of.setdefault(module, {})[local] = shape
    return [StoredModule(module, shapes, files) for module, shapes in locals_of.items()]
