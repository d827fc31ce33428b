"""Scaling of a linear's columns, undone in what comes before it: AWQ's scales and SmoothQuant's smoothing.

Columns become larger and their inputs smaller by the same factor: the model computes what it did, but rounds
otherwise. What comes before is a norm, or another linear whose
rows reach the columns one to one: v_proj for o_proj (through attention, which mixes tokens, not channels) and
up_proj for down_proj.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.calibration.layer import Layer, Stage
from fastserve.compression.errors import RecipeError
from fastserve.compression.sparsity_patterns import repack

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are built in this way."""
BEFORE = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
"""The module before the stage of a linear."""


def check_model_type(field: str, config: PretrainedConfig) -> None:
    """Raises RecipeError if we do not know what comes before the linears of such a model."""
    if config.model_type not in MODEL_TYPES:
        raise RecipeError(
            f"{field}: got a model of the type {config.model_type}; allowed: {', '.join(MODEL_TYPES)}"
        )


def smoothable(stage: Stage, names: tuple[str, ...]) -> bool:
    """Whether a stage, and the linear before it, are all among the targets."""
    before = BEFORE.get(stage[0])
    return before is not None and {*stage, *([before] if before.endswith("_proj") else [])} <= set(names)


def shared(factors: Tensor, layer: Layer, stage: Stage) -> Tensor:
    """Factors [K] that rows before the stage can take up: one for all query heads that share a value head."""
    before = BEFORE[stage[0]]
    if not before.endswith("v_proj"):
        return factors
    heads = _by_head(factors, layer, before)
    return heads.log().mean(1, keepdim=True).exp().expand_as(heads).flatten()


def smooth(layer: Layer, stage: Stage, factors: Tensor) -> None:
    """Multiplies the columns of a stage's linears by factors [K] as `shared` returns them, and divides what
    comes before. The factors are as exact as the dtype of the norms and weights there allows."""
    before = BEFORE[stage[0]]
    if before.endswith("_proj"):
        _divide_rows(layer, before, factors)
    else:
        norm = layer.other(f"{before}.weight")
        layer.replace_other(f"{before}.weight", norm / factors)
        divided = layer.other(f"{before}.weight")
        factors = torch.where(divided != 0, norm / divided, factors)
    for name in stage:
        layer.replace(name, repack(layer.weight(name), layer.dense(name) * factors))
        layer.reset_original(name)


def _divide_rows(layer: Layer, name: str, factors: Tensor) -> None:
    if name.endswith("v_proj"):
        factors = _by_head(factors, layer, name)[:, 0].flatten()
    bias = layer.other(f"{name}.bias") / factors if f"{name}.bias" in layer.part else None
    layer.replace(name, repack(layer.weight(name), layer.dense(name) / factors[:, None]), bias)
    layer.reset_original(name)


def _by_head(factors: Tensor, layer: Layer, name: str) -> Tensor:
    """Factors of query heads [K] as [value heads, query heads that share one, size of a head]."""
    size = cast(int, layer.module.get_submodule("self_attn").head_dim)
    return factors.view(layer.weight(name).out_features // size, -1, size)
