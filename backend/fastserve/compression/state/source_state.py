"""The model as it came: the state before the first step."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from fastserve.checkpoints.checkpoint import Checkpoint
from fastserve.checkpoints.gguf_checkpoint import GgufCheckpoint
from fastserve.checkpoints.gguf_config import exportable_gguf_config
from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.safetensors_checkpoint import SafetensorsCheckpoint
from fastserve.checkpoints.transformers_config import read_transformers_config
from fastserve.compression.errors import RecipeError
from fastserve.compression.state.model_state import State
from fastserve.models.decoder_tensors import has_own_head
from fastserve_kernels.formats import Dense, Weight


class SourceState(State):
    """A GGUF file, whose blocks are dequantized, or a Hugging Face directory of dense weights."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError if it cannot be read, RecipeError if no step can take it: its weights are
        quantized already, its architecture is another, or tensors are missing or of another shape.
        """
        self.path = path
        self._checkpoint: Checkpoint
        if path.is_file():
            file = GgufFile(path)
            self.config, self._checkpoint = exportable_gguf_config(file), GgufCheckpoint(file)
        else:
            self.config, self._checkpoint = read_transformers_config(path), SafetensorsCheckpoint(path)
        if getattr(self.config, "quantization_config", None) is not None:
            raise RecipeError(f"model: {path} is quantized already; allowed: a model with dense weights")
        if getattr(self.config, "tie_word_embeddings", False) and has_own_head(self._checkpoint, self.dtype):
            self.config.tie_word_embeddings = False
        self.meta_model.check()
        self._check_tensors()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the checkpoint's dense weights."""
        return self._checkpoint.dtype

    def digest(self) -> str:
        """A hash of what tells this model from others: its tensors' shapes, its files' names, sizes and
        times."""
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr((stats, sorted(self._checkpoint.shapes.items()))).encode()).hexdigest()

    def layer(self, index: int) -> dict[str, Tensor | Weight]:
        """A layer of the checkpoint, dequantized."""
        meta_model = self.meta_model
        matrices = {f"{name}.weight" for name in meta_model.linears(index)}
        prefix = f"{meta_model.prefix}{index}."
        return self._parts(meta_model.tensors(index), matrices, prefix)

    def outer(self) -> dict[str, Tensor | Weight]:
        """What is outside the layers of the checkpoint, dequantized."""
        matrices = {f"{name}.weight" for name in self.meta_model.outer_matrices()}
        return self._parts(self.meta_model.outer_tensors(), matrices, "")

    def _parts(self, names: tuple[str, ...], matrices: set[str], prefix: str) -> dict[str, Tensor | Weight]:
        parts: dict[str, Tensor | Weight] = {}
        for name in names:
            tensor = self._read(f"{prefix}{name}")
            if name in matrices:
                parts[name.removesuffix(".weight")] = Dense(tensor)
            else:
                parts[name] = tensor
        return parts

    def _check_tensors(self) -> None:
        meta_model, shapes = self.meta_model, self._checkpoint.shapes
        tensors = meta_model.model.state_dict()
        names = [
            f"{meta_model.prefix}{index}.{name}"
            for index in range(meta_model.num_layers)
            for name in meta_model.tensors(index)
        ]
        for name in (*meta_model.outer_tensors(), *names):
            wanted = tuple(tensors[name].shape)
            if name not in shapes:
                raise RecipeError(f"model: {self.path} has no tensor {name}; needed: one of shape {wanted}")
            if tuple(shapes[name]) != wanted:
                raise RecipeError(
                    f"model: {self.path}: {name} has the shape {tuple(shapes[name])}; needed: {wanted}"
                )

    def _read(self, name: str) -> Tensor:
        tensor = torch.empty(self._checkpoint.shapes[name], dtype=self.dtype)
        self._checkpoint.read(name, tensor)
        return tensor
