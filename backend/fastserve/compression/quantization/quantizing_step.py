"""The base class of steps that quantize linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from msgspec import Meta
from torch import Tensor, nn
from transformers import PretrainedConfig

from fastserve.compression.calibration.layer import Layer
from fastserve.compression.calibration.layer_step import LayerStep
from fastserve.compression.errors import RecipeError
from fastserve.compression.quantization.bias_correction import corrected_bias
from fastserve.compression.state.meta_model import MetaModel
from fastserve.compression.step import WeightKind
from fastserve_kernels.formats import Weight

Bits = Annotated[int, Meta(ge=2, le=8, description="bits of a code")]
GroupSize = Annotated[
    Literal[32, 64, 128] | None, Meta(description="columns of a row that share a scale; null: all of them")
]


class QuantizingStep(LayerStep, frozen=True, kw_only=True):
    """A step after which linears are codes of few bits."""

    accepts: ClassVar[frozenset[WeightKind]] = frozenset(("dense", "sparse"))
    produces: ClassVar[WeightKind | None] = "quantized"

    bias_correction: Annotated[
        bool, Meta(description="add to biases what rounding takes from the mean of the output")
    ] = False

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError if groups do not divide a linear, or biases are to be corrected where there are
        none."""
        linears = dict(targeted_linears(self, config))
        check_groups(getattr(self, "group_size", None), linears)
        if self.bias_correction and all(linear.bias is None for linear in linears.values()):
            raise RecipeError(
                f"bias_correction: got true; allowed: false, as no linear among the targets has a bias in a "
                f"model of the type {config.model_type}"
            )

    def put(self, layer: Layer, name: str, weight: Weight, mean: Tensor) -> None:
        """Replaces the weight of a linear of a layer, given the mean [K] of its input."""
        bias = None
        if self.bias_correction and f"{name}.bias" in layer.part:
            bias = corrected_bias(layer.other(f"{name}.bias"), layer.dense(name), weight.dequantize(), mean)
        layer.replace(name, weight, bias)


def targeted_linears(step: LayerStep, config: PretrainedConfig) -> Iterator[tuple[str, nn.Linear]]:
    """The linears that a step selects in a model of this config, by full name; they have no weights."""
    meta_model = MetaModel.of(config)
    for index, layer in enumerate(meta_model.layers):
        for name in meta_model.linears(index):
            linear = layer.get_submodule(name)
            full_name = f"{meta_model.prefix}{index}.{name}"
            if step.selects(full_name) and isinstance(linear, nn.Linear):
                yield full_name, linear


def check_groups(group_size: int | str | None, linears: Mapping[str, nn.Linear]) -> None:
    """Raises RecipeError if groups of so many columns do not divide the rows of a linear."""
    for name, linear in linears.items():
        if isinstance(group_size, int) and linear.in_features % group_size:
            raise RecipeError(
                f"group_size: got {group_size}; allowed: a divisor of the {linear.in_features} columns of "
                f"{name}, or null"
            )
