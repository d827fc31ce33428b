"""Structural pruning: whole attention heads, MLP channels and layers leave, and the model is rebuilt smaller.

A survey measures what each would cost, and from that the shape is chosen (`structure_survey`). Then, layer
after layer, o_proj and down_proj are solved anew from the columns that stay (`columns`), so that the hidden
states come as near as they can to those of the model before: that makes up for what left here, and in the
layers before. Until the end the model keeps its shape: what is to leave is zero.

All layers get the same shape, for an ordinary config cannot say otherwise.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, ClassVar

import torch
from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.calibration.importance import measure_importance
from fastserve.compression.calibration.layer import Layer
from fastserve.compression.calibration.layer_step import LayerStep, run_layers
from fastserve.compression.calibration.regression import Regression
from fastserve.compression.errors import RecipeError
from fastserve.compression.pruning.columns import kept_units, unit_columns
from fastserve.compression.pruning.model_shape import (
    BEFORE_MLP,
    DOWN,
    DecoderShape,
    O,
    check_layers,
    head_dim,
    heads_per_kv_head,
    parameters,
    prune_layer,
)
from fastserve.compression.pruning.structure_survey import Sizes, choose_shape, sizes_within, survey
from fastserve.compression.state.model_state import SCRATCH, SavedState, State, StateWriter, read_notes
from fastserve.compression.step import Context, Step, WeightKind
from fastserve_kernels.formats import Dense

MASKED = f"{SCRATCH}masked"
"""The directory, within the step's own, of the model with zeros for what is to leave."""


class Structure(Step, frozen=True, kw_only=True, tag="structure"):
    """Removes whole layers, heads and channels, and makes up for them by least squares."""

    parameters: (
        Annotated[float, Meta(gt=0, lt=1, description="part of the whole model's to remove, at least")] | None
    ) = None
    layers: Annotated[int, Meta(ge=0, description="how many to remove")] = 0
    kv_heads: Annotated[
        int, Meta(ge=0, description="to remove in each layer, with the heads that read them")
    ] = 0
    channels: Annotated[int, Meta(ge=0, description="channels of the MLP to remove in each layer")] = 0
    multiple: Annotated[
        int, Meta(ge=1, description="what the number of channels that `parameters` keeps is a multiple of")
    ] = 64

    accepts: ClassVar[frozenset[WeightKind]] = frozenset(("dense",))

    def check(self, config: PretrainedConfig) -> None:
        """Raises RecipeError for layers of another architecture, and for sizes that leave nothing."""
        check_layers(config)
        whole = Sizes(config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)
        given = {name: getattr(self, name) for name in Sizes._fields}
        if (self.parameters is None) == (not any(given.values())):
            raise RecipeError(
                f"parameters: got {self.parameters} with {given}; allowed: `parameters`, or some of those"
            )
        for name, size in whole._asdict().items():
            if given[name] >= size:
                raise RecipeError(
                    f"{name}: got {given[name]}; allowed: at most {size - 1}, for there are {size}"
                )
        if self.parameters is not None and not self._candidates(config):
            raise RecipeError(
                f"parameters: got {self.parameters}; allowed: more than 0, and less than what all layers have"
            )

    def config_after(self, config: PretrainedConfig) -> PretrainedConfig:
        """The config after pruning; of `parameters`, that of one of the candidates of about that size."""
        # All candidates are of about the same size; the last one has all layers, if any has.
        sizes = self._candidates(config)[-1]
        return DecoderShape(tuple(range(sizes.layers)), sizes.kv_heads, sizes.channels).config(config)

    def run(self, before: State, after: StateWriter, context: Context) -> None:
        """Chooses the shape, zeroes what is to leave while the rest is solved anew, and cuts the zeros
        away."""
        shape = self._shape(before, after, context)
        masked_directory = after.directory / MASKED
        if not (masked_directory / "config.json").is_file():
            group = head_dim(before.config) * heads_per_kv_head(before.config)
            run_layers(_Masking(shape=shape, group=group), before, StateWriter(masked_directory), context)
        masked = SavedState(masked_directory)
        for index, old in enumerate(shape.layers):
            after.write_layer(index, prune_layer(masked.layer(old), shape, before.config))
        after.write_outer(masked.outer())
        after.write_config(shape.config(before.config))

    def _candidates(self, config: PretrainedConfig) -> list[Sizes]:
        if self.parameters is not None:
            return sizes_within(config, self.parameters, self.multiple)
        whole = Sizes(config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)
        return [Sizes(*(size - getattr(self, name) for name, size in whole._asdict().items()))]

    def _shape(self, before: State, after: StateWriter, context: Context) -> DecoderShape:
        """The shape to prune to: that of an interrupted run if it chose one."""
        noted = read_notes(after.directory).get("shape")
        if noted is not None:
            return DecoderShape(tuple(noted["layers"]), noted["kv_heads"], noted["channels"])
        candidates = self._candidates(before.config)
        if self.parameters is None and not self.layers:
            shape = DecoderShape(tuple(range(before.num_layers)), *candidates[0][1:])
        else:
            importance = measure_importance(before, StateWriter(after.directory / MASKED), context)
            costs = survey(before, context, importance)
            shape = choose_shape(costs, candidates)
            after.note("influence", [layer.influence for layer in costs])
        after.note(
            "parameters", [parameters(config) for config in (before.config, shape.config(before.config))]
        )
        after.note("shape", asdict(shape))
        return shape


class _Masking(LayerStep, frozen=True, kw_only=True, tag="structure"):
    """Zeros for what is to leave, and the rest solved anew."""

    shape: DecoderShape
    group: int
    """Columns of o_proj that belong to a key/value head."""
    targets: tuple[str, ...] = ()
    with_reference: ClassVar[bool] = True
    weights_tokens: ClassVar[bool] = True

    def compress(self, layer: Layer, names: tuple[str, ...]) -> None:
        if layer.index not in self.shape.layers:
            _make_identity(layer)
            return
        for name, unit, count in ((O, self.group, self.shape.kv_heads), (DOWN, 1, self.shape.channels)):
            found = regression(layer, name)
            columns = unit_columns(kept_units(found.weighted(layer.output_weights(name)), unit, count), unit)
            weight = torch.zeros_like(layer.dense(name))
            weight[:, columns] = found.solve(columns)
            layer.replace(name, Dense(weight.to(layer.dtype)))


def _make_identity(layer: Layer) -> None:
    """Makes a layer an identity."""
    for name in (O, DOWN):
        layer.replace(name, Dense(torch.zeros_like(layer.dense(name)).to(layer.dtype)), _no_bias(layer, name))


def _no_bias(layer: Layer, name: str) -> Tensor | None:
    bias = f"{name}.bias"
    return torch.zeros_like(layer.other(bias)).to(layer.dtype) if bias in layer.part else None


def regression(layer: Layer, name: str) -> Regression:
    """The regression, on the inputs of o_proj or down_proj, of what these would have to add to the hidden
    states for them to be those of the model before."""
    weight, bias = layer.dense(name), f"{name}.bias"
    offset = layer.other(bias) if bias in layer.part else 0.0
    cross, hessian = torch.zeros_like(weight), weight.new_zeros(weight.shape[1], weight.shape[1])
    total, tokens = 0.0, 0
    for now, before, counts in zip(
        layer.batches(), layer.reference_batches(), layer.token_weights(name), strict=True
    ):
        if name == O:
            entering, (x,) = now.flatten(0, -2), layer.inputs((O,), now)
            (wanted,) = layer.reference_inputs((BEFORE_MLP,), before)
        else:
            entering, x = layer.inputs((BEFORE_MLP, DOWN), now)
            wanted = layer.run_reference(before).flatten(0, -2)
        counted = x * counts
        cross += (wanted - entering - offset).T @ counted
        hessian += x.T @ counted
        total, tokens = total + float(counts.sum()), tokens + len(x)
    return Regression.towards(weight, cross / total, hessian / total, tokens)
