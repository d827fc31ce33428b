"""FastServe's own layout of weights, `quant_method: "fastserve"`: docs/formats.md has it byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.checkpoints.compressed_checkpoint import StoredModule
from fastserve.checkpoints.model_error import ModelError
from fastserve_kernels.formats import Weight
from fastserve_kernels.formats.weight_io import weight_from_tensors

VERSION = 1


class FastServeLayout:
    """A `Layout`: each field of the weight's dataclass is a tensor of the module, or stands in the config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is `quantization_config`. Raises ModelError if it is of another version."""
        if config.get("version") != VERSION:
            raise ModelError(
                f"quantization_config.version: got {config.get('version')!r}; allowed: {VERSION}"
            )
        self._entries: Mapping[str, Mapping[str, Any]] = config["weights"]

    def holds(self, module: StoredModule) -> bool:
        return module.name in self._entries

    def shape(self, module: StoredModule) -> tuple[int, int]:
        rows, columns = self._entries[module.name]["shape"]
        return rows, columns

    def weight(self, module: StoredModule) -> Weight:
        entry = dict(self._entries[module.name])
        if entry["format"] != "BlockSparse":  # the only one of which the shape is a field
            del entry["shape"]
        return weight_from_tensors(entry, module.tensors())
