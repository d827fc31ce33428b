"""FastServe's own layout of weights, `quant_method: "fastserve"`: docs/formats.md has it byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.checkpoints.compressed_checkpoint import ModuleTensors
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

    def applies_to(self, module: ModuleTensors) -> bool:
        """Whether `quantization_config.weights` has an entry for it."""
        return module.name in self._entries

    def weight_shape(self, module: ModuleTensors) -> tuple[int, int]:
        """[N, K], from its entry."""
        rows, columns = self._entries[module.name]["shape"]
        return rows, columns

    def load_weight(self, module: ModuleTensors) -> Weight:
        """A weight of the format that its entry names. Raises ValueError for wrong or missing fields."""
        entry = dict(self._entries[module.name])
        if entry["format"] != "BlockSparse":  # the only format that has its shape as a field
            del entry["shape"]
        return weight_from_tensors(entry, module.tensors())
