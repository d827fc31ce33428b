"""The quantization methods of `config.json`, each with the layout of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.checkpoints.awq_layout import AwqLayout
from fastserve.checkpoints.checkpoint import Checkpoint
from fastserve.checkpoints.compressed_checkpoint import CompressedCheckpoint, Layout
from fastserve.checkpoints.compressed_tensors_layout import CompressedTensorsLayout
from fastserve.checkpoints.decoder_config import quant_method
from fastserve.checkpoints.fastserve_layout import FastServeLayout
from fastserve.checkpoints.gptq_layout import GptqLayout
from fastserve.checkpoints.safetensors_checkpoint import SafetensorsCheckpoint
from fastserve.checkpoints.sparse_24_layout import CONFIG_KEY, Sparse24Layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Layout]] = {
    "compressed-tensors": CompressedTensorsLayout,
    "gptq": GptqLayout,
    "awq": AwqLayout,
    "fastserve": FastServeLayout,
}
"""The layouts by `quant_method`: all of `decoder_config.QUANT_METHODS`."""


def open_checkpoint(directory: Path, config: PretrainedConfig) -> Checkpoint:
    """The checkpoint in the directory of a model that our decoder computes.

    Raises ModelError if it cannot be read.
    """
    files, layout = SafetensorsCheckpoint(directory), _layout(config)
    return files if layout is None else CompressedCheckpoint(files, layout)


def _layout(config: PretrainedConfig) -> Layout | None:
    method = quant_method(config)
    layout = None if method is None else LAYOUTS[method](config.quantization_config)
    names = getattr(config, CONFIG_KEY, None)
    return layout if names is None else Sparse24Layout(names, layout)
