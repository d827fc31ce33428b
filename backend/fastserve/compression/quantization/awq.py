"""Activation-aware scale search: AWQ (Lin et al., arXiv 2306.00978).

Columns whose inputs are large are made larger before rounding, which then costs the output less. What is
tried is magnitude^p / largest^(1 - p) and magnitude^p, with the mean magnitude of the inputs and the largest
weight of each column. The step leaves a dense model that computes what it did: the next one rounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar

import torch
from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.calibration.layer import Layer
from fastserve.compression.calibration.layer_step import LayerStep
from fastserve.compression.quantization.grid import Grid
from fastserve.compression.quantization.quantizing_step import Bits, GroupSize, check_groups, targeted_linears
from fastserve.compression.quantization.smoothing import check_model_type, shared, smooth, smoothable
from fastserve.compression.step import WeightKind

POWERS = tuple(step / 10 for step in range(1, 11))
"""Exponents that the search tries."""
_SMALLEST = 1e-4
"""Least magnitude, relative to the mean."""


def candidate_scales(magnitude: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Factors [K] for inputs of this mean magnitude [K] and a weight [N, K]; around 1."""
    magnitude = (magnitude / magnitude.mean()).clamp(min=_SMALLEST)
    largest = weight.abs().amax(0)
    largest = (largest / largest.mean()).clamp(min=_SMALLEST)
    for power in POWERS:
        for factors in (magnitude**power, magnitude**power / largest ** (1 - power)):
            yield factors / (factors.amax() * factors.amin()).sqrt()


def output_cost(difference: Tensor, hessian: Tensor) -> float:
    """E||D x||^2 for a difference D [N, K] of weights and the Hessian [K, K] of the inputs."""
    return float(((difference @ hessian) * difference).sum())


class Awq(LayerStep, frozen=True, kw_only=True, tag="awq"):
    """Scales columns by what their inputs are like, for the step after it to round them better."""

    accepts: ClassVar[frozenset[WeightKind]] = frozenset(("dense", "sparse"))
    weights_tokens: ClassVar[bool] = True

    bits: Bits = 4
    group_size: GroupSize = 64
    symmetric: Annotated[bool, Meta(description="as in the step that rounds")] = False

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError for a model type without known norms, or groups that do not divide a linear."""
        check_model_type("awq", config)
        check_groups(self.group_size, dict(targeted_linears(self, config)))

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        """Searches and applies scales, stage by stage."""
        for stage in layer.stages:
            if smoothable(stage, names):
                factors = self.search_scales(layer, stage)
                if factors is not None:
                    smooth(layer, stage, factors)

    def search_scales(self, layer: Layer, stage: tuple[str, ...]) -> Tensor | None:
        """The factors [K] with which rounding a stage costs least; None if without any it does."""
        weights = [layer.dense(name) for name in stage]
        moments = [layer.moments(name) for name in stage]
        magnitude = sum((each.importance * each.magnitude for each in moments), torch.zeros(()))

        def cost(factors: Tensor) -> float:
            return sum(
                each.importance * output_cost(self.rounded(weight, factors, layer) - weight, each.hessian)
                for weight, each in zip(weights, moments, strict=True)
            )

        return least_cost(
            cost, (shared(f, layer, stage) for f in candidate_scales(magnitude, torch.cat(weights)))
        )

    def rounded(self, weight: Tensor, factors: Tensor, layer: Layer) -> Tensor:
        """A weight [N, K] after rounding its columns times factors [K]."""
        scaled = weight * factors
        group_size = self.group_size or weight.shape[1]
        grid = Grid.min_max(scaled, self.bits, group_size, layer.dtype, self.symmetric)
        return grid.dequantize(grid.quantize(scaled)) / factors


def least_cost(cost: Callable[[Tensor], float], tried: Iterator[Tensor]) -> Tensor | None:
    """The factors [K] of least cost among those tried; None if none of them costs less than no scaling
    does."""
    best: Tensor | None = None
    least: float | None = None
    for factors in tried:
        if least is None:
            least = cost(torch.ones_like(factors))
        found = cost(factors)
        if found < least:
            best, least = factors, found
    return best
