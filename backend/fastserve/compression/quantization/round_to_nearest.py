"""Rounding to nearest, one weight at a time: the reference that the others are measured against."""

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
from fastserve.compression.quantization.grid import Grid, search
from fastserve.compression.quantization.quantizing_step import Bits, QuantizingStep
from fastserve.compression.quantization.uniform import GroupSize, quantize
from fastserve.compression.sparsity_patterns import mask_of
from fastserve_kernels.formats import Weight

Clip = Literal["none", "weights", "outputs"]
DAMPING = 0.01


class Round(QuantizingStep, frozen=True, kw_only=True, tag="round"):
    """Gives every weight the nearest value of its group's grid."""

    bits: Bits = 8
    group_size: Annotated[
        GroupSize,
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
        return self.clip == "outputs" or self.bias_correction

    def check(self, config: PretrainedConfig) -> None:
        super().check(config)
        if self.clip != "none" and (self.group_size == "tensor" or self.zero_points == "exact"):
            raise RecipeError(
                f'clip: got "{self.clip}"; allowed: "none" with group_size "tensor" or zero_points "exact"'
            )

    def sketch(self, weight: Weight, dtype: torch.dtype) -> Weight:
        dense = weight.dequantize()
        grid = msgspec.structs.replace(self, clip="none").grid(dense, dense, dtype)
        return pack(grid, grid.nearest(dense), weight)

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        for name in layer.in_order(names):
            if self.zero_points == "exact" and mask_of(layer.weight(name)) is not None:
                raise RecipeError(
                    f'zero_points: got "exact"; allowed: "whole" for {layer.prefix}{name}, which is '
                    "pruned: 0 must be one of its values"
                )
            weight = layer.dense(name)
            moments = layer.moments(name)
            grid = self.grid(weight, moments.hessian, layer.dtype)
            packed = pack(grid, grid.nearest(weight), layer.weight(name))
            self.put(layer, name, packed, moments.mean)

    def grid(self, weight: Tensor, hessian: Tensor, dtype: torch.dtype) -> Grid:
        """For a weight [N, K] and the gram matrix [K, K] of its inputs."""
        columns = weight.shape[1]
        group_size = self.group_size if isinstance(self.group_size, int) else columns
        if self.zero_points == "exact":
            return quantize(weight, self.bits, self.symmetric, self.group_size).grid(dtype)
        if self.group_size == "tensor":
            low, high = (value.expand(len(weight), 1) for value in (weight.amin(), weight.amax()))
            low, high = low.clamp(max=0), high.clamp(min=0)
            return Grid.from_ranges(low, high, self.bits, columns, dtype, self.symmetric)
        if self.clip == "none":
            return Grid.whole_range(weight, self.bits, group_size, dtype, self.symmetric)
        metric = blocks(damped(hessian, DAMPING), group_size) if self.clip == "outputs" else None
        return search(weight, self.bits, group_size, self.symmetric, dtype, metric)


def blocks(hessian: Tensor, group_size: int) -> Tensor:
    """Those on the diagonal [K / G, G, G] of a matrix [K, K]."""
    starts = range(0, len(hessian), group_size)
    return torch.stack([hessian[start : start + group_size, start : start + group_size] for start in starts])
