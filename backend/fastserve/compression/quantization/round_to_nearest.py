"""Round to nearest (RTN), one weight at a time: the baseline that the others are measured against."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.calibration.hessian import damped
from fastserve.compression.calibration.layer import Layer
from fastserve.compression.errors import RecipeError
from fastserve.compression.quantization.gptq import pack
from fastserve.compression.quantization.grid import Grid, group_ranges, search
from fastserve.compression.quantization.quantizing_step import Bits, GroupSize, QuantizingStep
from fastserve.compression.sparsity_patterns import mask_of
from fastserve_kernels.formats import Weight

Clip = Literal["none", "weights", "outputs"]
DAMPING = 0.01


class Round(QuantizingStep, frozen=True, kw_only=True, tag="round"):
    """Gives every weight the nearest value of its group's grid."""

    bits: Bits = 8
    group_size: Annotated[
        GroupSize | Literal["tensor"],
        Meta(description='columns of a row that share a range; null: all of them; "tensor": all rows do too'),
    ] = 64
    symmetric: Annotated[bool, Meta(description="a range from -a to a")] = False
    clip: Annotated[
        Clip,
        Meta(description="the range: that of all weights, or what costs the weights or the outputs least"),
    ] = "none"
    zero_points: Annotated[
        Literal["whole", "exact"],
        Meta(description="whole numbers, as other loaders need them, or what the formula's x_min comes to"),
    ] = "whole"

    @property
    def measures(self) -> bool:
        """True where the range is clipped for the outputs, and for bias correction."""
        return self.clip == "outputs" or self.bias_correction

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError for groups that do not fit, and for clipping of ranges that are not searched."""
        super().check(config)
        if self.clip != "none" and (self.group_size == "tensor" or self.zero_points == "exact"):
            raise RecipeError(
                f'clip: got "{self.clip}"; allowed: "none" with group_size "tensor" or zero_points "exact"'
            )

    def dummy_output(self, weight: Weight, dtype: torch.dtype) -> Weight:
        """The weight on its min-max grid."""
        dense = weight.dequantize()
        grid = msgspec.structs.replace(self, clip="none").grid(dense, dense, dtype)
        return pack(grid, grid.quantize(dense), weight)

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        """Rounds the linears of these names to nearest. Raises RecipeError for a sparse one with exact zero
        points."""
        for name in layer.in_order(names):
            if self.zero_points == "exact" and mask_of(layer.weight(name)) is not None:
                raise RecipeError(
                    f'zero_points: got "exact"; allowed: "whole" for {layer.prefix}{name}, which is '
                    "pruned: 0 must be one of its values"
                )
            weight = layer.dense(name)
            moments = layer.moments(name)
            grid = self.grid(weight, moments.hessian, layer.dtype)
            packed = pack(grid, grid.quantize(weight), layer.weight(name))
            self.put(layer, name, packed, moments.mean)

    def grid(self, weight: Tensor, hessian: Tensor, dtype: torch.dtype) -> Grid:
        """The grid for a weight [N, K], given the Hessian [K, K] of its inputs."""
        size = self.group_size if isinstance(self.group_size, int) else weight.shape[1]
        if self.clip != "none":
            metric = diagonal_blocks(damped(hessian, DAMPING), size) if self.clip == "outputs" else None
            return search(weight, self.bits, size, self.symmetric, dtype, metric)
        if self.group_size == "tensor":
            low, high = (value.float().expand(len(weight), 1) for value in weight.aminmax())
        else:
            low, high = group_ranges(weight, size)
        from_ranges = Grid.exact if self.zero_points == "exact" else Grid.from_ranges
        return from_ranges(low, high, self.bits, size, dtype, self.symmetric)


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The blocks [K / G, G, G] on the diagonal of a matrix [K, K], G being their size."""
    starts = range(0, len(matrix), size)
    return torch.stack([matrix[start : start + size, start : start + size] for start in starts])
