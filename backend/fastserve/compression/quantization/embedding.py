"""The embedding and the head in few bits: they are no part of a layer, and often one matrix."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from msgspec import Meta
from transformers import PretrainedConfig

from fastserve.compression.errors import RecipeError
from fastserve.compression.quantization.grid import Grid, search
from fastserve.compression.state.meta_model import MetaModel
from fastserve.compression.state.model_state import State, StateWriter
from fastserve.compression.step import Context, Step
from fastserve_kernels.formats import Dense, Weight


class Embedding(Step, frozen=True, kw_only=True, tag="embedding"):
    """Rounds the embedding and the head to nearest; a head that is the embedding stays it."""

    bits: Literal[4, 8] = 8
    group_size: Literal[32, 64, 128] = 64
    symmetric: Annotated[bool, Meta(description="no zero points")] = False

    changes_outer: ClassVar[bool] = True

    def selects(self, linear: str) -> bool:
        """False: no linear of a layer changes."""
        return False

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError if groups do not divide the columns of the embedding or the head."""
        meta_model = MetaModel.of(config)
        for name in meta_model.outer_matrices():
            columns = meta_model.model.get_parameter(f"{name}.weight").shape[1]
            if columns % self.group_size:
                raise RecipeError(
                    f"group_size: got {self.group_size}; allowed: a divisor of the {columns} columns of "
                    f"{name}"
                )

    def dummy_output(self, weight: Weight, dtype: torch.dtype) -> Weight:
        """The weight on its min-max grid."""
        dense = weight.dequantize()
        grid = Grid.min_max(dense, self.bits, self.group_size, dtype, self.symmetric)
        return grid.pack(grid.quantize(dense))

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        """Copies the layers, and quantizes the embedding and the head."""
        for index in range(before.num_layers):
            after.write_layer(index, before.layer(index))
        outer = {
            name: self.pack(name, part) if isinstance(part, Weight) else part
            for name, part in before.outer().items()
        }
        after.write_outer(outer)
        after.write_config(before.config)

    def pack(self, name: str, weight: Weight) -> Weight:
        """Raises RecipeError if it is quantized already."""
        if not isinstance(weight, Dense):
            raise RecipeError(f"embedding: {name} is {type(weight).__name__}; allowed: a dense one")
        dense = weight.dequantize()
        grid = search(dense, self.bits, self.group_size, self.symmetric, weight.weight.dtype)
        return grid.pack(grid.quantize(dense))
