"""The state of a model between two steps, whole and on disk, and its writer."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from fastserve.atomic_write import atomic_write, sync, write_bytes, write_errors
from fastserve.compression.state.meta_model import MetaModel
from fastserve_kernels.formats import Weight
from fastserve_kernels.formats.weight_io import tensor_fields, weight_from_tensors, weight_tensors

Part = Mapping[str, Tensor | Weight]
"""Part of a model: matrices by the name of their module, other tensors by their own."""
OUTER = "outer"
NOTES, DONE = "notes.json", "done"
SCRATCH = "scratch-"
"""The prefix of files and directories that only an unfinished step needs."""


class State(ABC):
    """A model between two steps; the model as it came is the first."""

    config: PretrainedConfig

    @abstractmethod
    def layer(self, index: int) -> dict[str, Tensor | Weight]:
        """A decoder layer by local names: linears (`mlp.up_proj`) as weights, norms and biases as tensors."""

    @abstractmethod
    def outer(self) -> dict[str, Tensor | Weight]:
        """What is outside the layers: `model.embed_tokens` and `lm_head` (unless it is the former) as
        weights, `model.norm.weight` as a tensor."""

    @cached_property
    def meta_model(self) -> MetaModel:
        """The modules around the weights, on the CPU."""
        return MetaModel.of(self.config)

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return self.meta_model.num_layers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the norms, in which dense weights are kept."""
        return next(part.dtype for part in self.outer().values() if isinstance(part, Tensor))

    def linears(self, index: int) -> dict[str, Weight]:
        """A layer's linears by local name."""
        return {name: part for name, part in self.layer(index).items() if isinstance(part, Weight)}

    def others(self, index: int) -> dict[str, Tensor]:
        """A layer's other tensors by local name: norms, biases, scales."""
        return {name: part for name, part in self.layer(index).items() if isinstance(part, Tensor)}

    def dense_layer(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors by local name, in float32, as transformers knows them."""
        known = set(self.meta_model.tensors(index))
        return {name: tensor for name, tensor in dense(self.layer(index)).items() if name in known}

    def transformers_model(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The whole model with dense weights."""
        meta_model = MetaModel(self.config, torch.device(device))
        tensors = dense(self.outer())
        for index in range(self.num_layers):
            prefix = f"{meta_model.prefix}{index}."
            tensors |= {f"{prefix}{name}": t.to(dtype) for name, t in self.dense_layer(index).items()}
        tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        meta_model.model.load_state_dict(tensors, assign=True, strict=False)
        model: Any = meta_model.model
        model.tie_weights()
        return model


def dense(part: Part) -> dict[str, Tensor]:
    """A part of a model as ordinary float32 tensors under the names that transformers gives them."""
    return {
        f"{name}.weight" if isinstance(value, Weight) else name: (
            value.dequantize() if isinstance(value, Weight) else value.float()
        )
        for name, value in part.items()
    }


class SavedState(State):
    """A state in a directory that a `StateWriter` wrote."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = AutoConfig.from_pretrained(directory, local_files_only=True)

    def layer(self, index: int) -> dict[str, Tensor | Weight]:
        """The layer as it was written."""
        return read_part(self.directory / _layer_file(index))

    def outer(self) -> dict[str, Tensor | Weight]:
        """What is outside the layers, as it was written."""
        return read_part(self.directory / f"{OUTER}.safetensors")

    @property
    def notes(self) -> dict[str, Any]:
        """What the step noted for the report."""
        return read_notes(self.directory)


class StateWriter:
    """Writes the state after a step, part by part; each part appears whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with write_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        self._notes = read_notes(directory)

    def write_layer(self, index: int, layer: Part) -> None:
        """Writes a layer by local names. Raises WriteError."""
        write_part(self.directory / _layer_file(index), layer)

    def write_outer(self, outer: Part) -> None:
        """Writes what is outside the layers. Raises WriteError."""
        write_part(self.directory / f"{OUTER}.safetensors", outer)

    def write_config(self, config: PretrainedConfig) -> None:
        """Writes the config. Raises WriteError."""
        write_bytes(self.directory / CONFIG_NAME, config.to_json_string().encode())

    @property
    def is_finished(self) -> bool:
        """Whether the state is whole."""
        return (self.directory / DONE).is_file()

    def finish(self) -> None:
        """Says that the state is whole, which a loss of power does not change, and removes the scratch."""
        with write_errors(self.directory):
            sync(self.directory)
        write_bytes(self.directory / DONE, b"")
        for path in self.directory.glob(f"{SCRATCH}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def note(self, key: str, value: Any) -> None:
        """Keeps a fact for the report, as JSON has it; a key that is noted again has the new value."""
        self._notes[key] = value
        write_bytes(self.directory / NOTES, json.dumps(self._notes).encode())


def write_part(path: Path, part: Part, **facts: str) -> None:
    """Weights and tensors as one safetensors file; `facts` go into its header."""
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for name, value in part.items():
        if isinstance(value, Weight):
            fields, entries[name] = weight_tensors(value)
            tensors |= {f"{name}.{field}": tensor for field, tensor in fields.items()}
        else:
            tensors[name] = value.contiguous()
    save_tensors(tensors, path, {"weights": json.dumps(entries), **facts})


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all. Raises WriteError."""
    with atomic_write(path, sum(tensor.nbytes for tensor in tensors.values())) as unfinished:
        save_file(tensors, unfinished, metadata)


def read_part(path: Path) -> dict[str, Tensor | Weight]:
    """The part of a model in a file that `write_part` wrote."""
    with safe_open(path, framework="pt") as file:
        entries = json.loads(file.metadata()["weights"])
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    part: dict[str, Tensor | Weight] = {}
    for name, entry in entries.items():
        fields = {field: f"{name}.{field}" for field in tensor_fields(entry["format"])}
        stored = {field: tensors.pop(key) for field, key in fields.items() if key in tensors}
        part[name] = weight_from_tensors(entry, stored)
    return part | tensors


def read_notes(directory: Path) -> dict[str, Any]:
    """The notes in a step's directory; empty if there are none yet."""
    path = directory / NOTES
    return json.loads(path.read_text()) if path.is_file() else {}


def _layer_file(index: int) -> str:
    return f"layer-{index:04d}.safetensors"
