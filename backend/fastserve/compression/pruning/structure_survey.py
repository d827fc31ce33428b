"""Costs of structural pruning in one measure: the nats by which the model's predictions would change, to
second order (`sensitivity`).

A change d of the hidden states costs sum_n E[g_n^2] E[d_n^2 |g|^2] / (2 E[|g|^2]), with g the gradients
there. For a layer left out, d is what it adds; for heads and channels, the least error that the columns of
o_proj and down_proj that stay can reach (`columns`). Costs are added up, as if one did not depend on the
others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.calibration.importance import Importance
from fastserve.compression.calibration.layer import Layer
from fastserve.compression.calibration.layer_step import survey_layers
from fastserve.compression.calibration.regression import Regression
from fastserve.compression.pruning.columns import removal_order
from fastserve.compression.pruning.model_shape import (
    DOWN,
    GATE,
    UP,
    DecoderShape,
    K,
    O,
    Q,
    V,
    head_dim,
    heads_per_kv_head,
    parameters,
)
from fastserve.compression.state.meta_model import MetaModel
from fastserve.compression.state.model_state import State
from fastserve.compression.step import Context


@dataclass(frozen=True)
class LayerCosts:
    """Costs of leaving out parts of a layer, in nats per token."""

    influence: float
    """The cost of leaving out the whole layer."""
    kv_heads: Tensor
    """[kv_heads] costs of leaving out 0, 1, ... of its groups of heads."""
    channels: Tensor
    """[channels] costs of leaving out 0, 1, ... channels of its MLP."""


class Sizes(NamedTuple):
    """The sizes of a model that stay."""

    layers: int
    kv_heads: int
    channels: int


def survey(state: State, context: Context, importance: Importance) -> list[LayerCosts]:
    """The costs of each layer, on the calibration text."""
    group = head_dim(state.config) * heads_per_kv_head(state.config)
    return [_layer_costs(layer, group) for layer in survey_layers("survey", state, context, importance)]


def choose_shape(costs: list[LayerCosts], candidates: list[Sizes]) -> DecoderShape:
    """The candidate that costs least, and with it the layers that stay."""
    sizes = min(candidates, key=lambda candidate: total_cost(costs, candidate))
    return DecoderShape(_kept_layers(costs, sizes.layers), sizes.kv_heads, sizes.channels)


def total_cost(costs: list[LayerCosts], sizes: Sizes) -> float:
    """The cost of pruning to these sizes, made of the layers of most influence."""
    kept = _kept_layers(costs, sizes.layers)
    gone = sum(layer.influence for index, layer in enumerate(costs) if index not in kept)
    return gone + sum(
        float(costs[index].kv_heads[-sizes.kv_heads] + costs[index].channels[-sizes.channels])
        for index in kept
    )


def sizes_within(config: PretrainedConfig, removed: float, multiple: int) -> list[Sizes]:
    """The largest models of which at least this part of the parameters is gone: for each number of layers and
    heads, with as many channels as that leaves, in multiples."""
    whole = Sizes(config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)
    budget = (1 - removed) * parameters(config)
    layer, kv_head, channel = _unit_parameters(config)
    outside = parameters(config) - whole.layers * layer
    found = []
    for layers in range(1, whole.layers + 1):
        for kv_heads in range(1, whole.kv_heads + 1):
            rest = (budget - outside) / layers - (layer - (whole.kv_heads - kv_heads) * kv_head)
            channels = min(whole.channels, int(whole.channels + rest / channel) // multiple * multiple)
            if channels > 0:
                found.append(Sizes(layers, kv_heads, channels))
    return found


def _unit_parameters(config: PretrainedConfig) -> tuple[int, int, int]:
    """Parameters of a layer, of one of its groups of heads, of one of its channels."""
    sizes = {name: t.numel() for name, t in MetaModel.of(config).layers[0].state_dict().items()}
    kv_heads = sum(sizes.get(f"{name}.{kind}", 0) for name in (Q, K, V) for kind in ("weight", "bias"))
    channels = sum(sizes.get(f"{name}.{kind}", 0) for name in (GATE, UP) for kind in ("weight", "bias"))
    kv_head = (kv_heads + sizes[f"{O}.weight"]) // int(config.num_key_value_heads)
    channel = (channels + sizes[f"{DOWN}.weight"]) // int(config.intermediate_size)
    return sum(sizes.values()), kv_head, channel


def _kept_layers(costs: list[LayerCosts], count: int) -> tuple[int, ...]:
    ranked = sorted(range(len(costs)), key=lambda index: -costs[index].influence)
    return tuple(sorted(ranked[:count]))


def _layer_costs(layer: Layer, group: int) -> LayerCosts:
    influence = torch.zeros_like(layer.output_weights(DOWN))
    total = 0.0
    for hidden, counts in zip(layer.batches(), layer.token_weights(DOWN), strict=True):
        added = (layer.run(hidden) - hidden).flatten(0, -2)
        influence += (added.square() * counts).sum(0)
        total += float(counts.sum())
    errors = {}
    for name, unit in ((O, group), (DOWN, 1)):
        weight, moments = layer.dense(name), layer.moments(name)
        found = Regression.towards(weight, weight @ moments.hessian, moments.hessian, moments.tokens)
        weighted = found.weighted(layer.output_weights(name) / 2)
        errors[name] = removal_order(weighted, unit, weight.shape[1] // unit - 1).errors.cpu()
    return LayerCosts(float(influence @ layer.output_weights(DOWN)) / total / 2, errors[O], errors[DOWN])
