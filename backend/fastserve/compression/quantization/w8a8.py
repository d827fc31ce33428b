"""W8A8 with SmoothQuant: weights and activations in int8, with a scale per row and one per token.

A channel whose activations are large takes the steps of all others. SmoothQuant (Xiao et al., arXiv
2211.10438) moves such size from activations to weights, by factors max|x|^a / max|w|^(1 - a) of each channel;
the a of each stage is searched. Then the weights are rounded as in `gptq.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

import torch
from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.calibration.hessian import Damping, damped
from fastserve.compression.calibration.layer import Layer, round_rows
from fastserve.compression.quantization.awq import least_cost
from fastserve.compression.quantization.gptq import gptq_quantize
from fastserve.compression.quantization.quantizing_step import QuantizingStep
from fastserve.compression.quantization.smoothing import check_model_type, shared, smooth, smoothable
from fastserve_kernels.formats import W8A8, Int8, Weight

MIGRATION_STRENGTHS = tuple(step / 10 for step in range(1, 10))
"""Migration strengths a that are tried."""
TOKENS = 2048
"""Tokens of the calibration text, evenly spread, that the search rounds."""
_SMALLEST = 1e-5


def candidate_scales(x: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Factors [K] for inputs x [tokens, K] and a weight [N, K]."""
    inputs = x.abs().amax(0).clamp(min=_SMALLEST)
    largest = weight.abs().amax(0).clamp(min=_SMALLEST)
    for strength in MIGRATION_STRENGTHS:
        yield inputs**strength / largest ** (1 - strength)


class W8A8Step(QuantizingStep, frozen=True, kw_only=True, tag="w8a8"):
    """Rounds weights and activations to eight bits."""

    weights_tokens: ClassVar[bool] = True

    smoothing: Annotated[
        bool, Meta(description="move what is large in a channel from activations to weights")
    ] = True
    damping: Damping = 0.01

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError for a model type without known norms, if smoothing is asked for."""
        super().check(config)
        if self.smoothing:
            check_model_type("smoothing", config)

    def dummy_output(self, weight: Weight, dtype: torch.dtype) -> Weight:
        """The weight rounded to nearest."""
        return W8A8.pack(weight.dequantize())

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        """Smooths stage by stage, then quantizes the linears of these names with GPTQ."""
        for stage in layer.stages:
            if self.smoothing and smoothable(stage, names):
                factors = search_smoothing_factors(layer, stage)
                if factors is not None:
                    smooth(layer, stage, factors)
        for name in layer.in_order(names):
            moments = layer.moments(name)
            packed = pack(layer.dense(name), damped(moments.hessian, self.damping))
            self.put(layer, name, packed, moments.mean)


def pack(weight: Tensor, hessian: Tensor) -> W8A8:
    """A weight [N, K], rounded with second-order correction for inputs of this Hessian [K, K]."""
    grid, codes = gptq_quantize(weight, hessian, 8, weight.shape[1], True, torch.float32)
    packed = grid.pack(codes)
    assert isinstance(packed, Int8)
    return W8A8(packed.values, packed.scales[:, 0].contiguous())


def search_smoothing_factors(layer: Layer, stage: tuple[str, ...]) -> Tensor | None:
    """The factors [K] with which rounding weights and inputs of a stage costs its output least; None: none
    do."""
    x = some_inputs(layer, stage)
    weight = torch.cat([layer.dense(name) for name in stage])
    wanted = x @ weight.T

    def cost(factors: Tensor) -> float:
        rounded = round_rows(x / factors, 127) @ round_rows(weight * factors, 127.5).T
        return float((rounded - wanted).square().sum())

    return least_cost(cost, (shared(factors, layer, stage) for factors in candidate_scales(x, weight)))


def some_inputs(layer: Layer, stage: tuple[str, ...]) -> Tensor:
    """About TOKENS of the inputs [tokens, K] of a stage, evenly spread."""
    total = sum(batch.shape[0] * batch.shape[1] for batch in layer.batches())
    every = max(1, total // TOKENS)
    return torch.cat([layer.inputs(stage[:1], batch)[0][::every] for batch in layer.batches()])
