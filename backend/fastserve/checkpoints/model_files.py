"""Where the files of a model lie on this machine, for every process of the server. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastserve.assets import default_model
from fastserve.checkpoints.model_path import resolve_model_path
from fastserve.checkpoints.tokenizer_directory import resolve_tokenizer_directory


@dataclass(frozen=True)
class ModelFiles:
    """The paths of a model's weights and of its tokenizer."""

    checkpoint: Path
    """A GGUF file, or a Hugging Face directory with `config.json` and safetensors files."""
    tokenizer: Path
    """A directory with the tokenizer's files as transformers saves them."""


def locate(model: str) -> ModelFiles:
    """The files of the `model` setting; empty: the default model. What is missing is fetched or made, once.

    Raises ModelError if there is no such model, StartError if the default one cannot be fetched.
    """
    checkpoint = resolve_model_path(model) if model else default_model()
    return ModelFiles(checkpoint, resolve_tokenizer_directory(checkpoint))
