"""Structural pruning: whole attention heads, MLP channels and layers leave, and the model is rebuilt smaller.

Two passes over the model. The survey measures what it would cost to leave out each layer, and ever more heads
and channels of each; from that the shape is chosen. Then, layer after layer, o_proj and down_proj are solved
anew from the columns that stay, so that the hidden states come as near as they can to those of the model
before: that makes up for what left here, and in the layers before.

All layers get the same shape, for an ordinary config says nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

import torch
from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.columns import Regression, removal, unit_columns
from fastserve.compression.layer import Layer
from fastserve.compression.layer_runner import run_layers, survey_layers
from fastserve.compression.model_shape import (
    BEFORE_MLP,
    DOWN,
    O,
    Shape,
    check_layers,
    cut,
    head_dim,
    heads_per_kv_head,
    parameters,
)
from fastserve.compression.state import SavedState, State, StateWriter
from fastserve.compression.step import Context, Kind, LayerStep, RecipeError, Step
from fastserve_kernels.formats import Dense
