"""Where a model's files lie on this machine. No torch here: every process of the server asks this."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastserve.assets import default_model
from fastserve.checkpoints.model_directory import (
    resolve_model_path,
    resolve_tokenizer_directory,
)


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk."""

    checkpoint: Path
    """A GGUF file or a Hugging Face directory."""
    tokenizer: Path
    """A directory with the tokenizer's files as transformers saves them."""


def locate(model: str) -> ModelFiles:
    """The files of the `model` setting; empty: the default model. What is missing is fetched or made, once.

    Raises ModelError or DownloadError.
    """
    checkpoint = resolve_model_path(model) if model else default_model()
    return ModelFiles(checkpoint, resolve_tokenizer_directory(checkpoint))
