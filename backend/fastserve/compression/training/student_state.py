"""The initial student: a smaller model of another's own layers, heads, channels and columns, picked
evenly."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.errors import RecipeError
from fastserve.compression.pruning.columns import unit_columns
from fastserve.compression.pruning.model_shape import (
    DOWN,
    GATE,
    UP,
    DecoderShape,
    K,
    O,
    Q,
    V,
    check_layers,
    head_dim,
    heads_per_kv_head,
)
from fastserve.compression.state.model_state import Part, State
from fastserve_kernels.formats import Dense, Weight

Size = Annotated[int, Meta(ge=1)]


class StudentSizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes of a student, by the names of its config; None: as in the model that it is made of."""

    num_hidden_layers: Size | None = None
    num_attention_heads: Size | None = None
    intermediate_size: Size | None = None
    hidden_size: Size | None = None

    def config(self, config: PretrainedConfig) -> PretrainedConfig:
        """The student's, given that of the model that it is made of.

        Raises RecipeError for a size that is larger, and for heads that do not divide into groups.
        """
        check_layers(config)
        sizes = {name: self._size(name, config) for name in self.__struct_fields__}
        group = heads_per_kv_head(config)
        if sizes["num_attention_heads"] % group:
            raise RecipeError(
                f"student.num_attention_heads: got {sizes['num_attention_heads']}; allowed: multiples of "
                f"{group}, the heads that share a key"
            )
        layers = evenly(config.num_hidden_layers, sizes["num_hidden_layers"])
        heads = sizes["num_attention_heads"] // group
        smaller = DecoderShape(tuple(layers.tolist()), heads, sizes["intermediate_size"]).config(config)
        smaller.hidden_size = sizes["hidden_size"]
        return smaller

    def _size(self, name: str, config: PretrainedConfig) -> int:
        largest: int = getattr(config, name)
        size: int | None = getattr(self, name)
        if size is not None and size > largest:
            raise RecipeError(f"student.{name}: got {size}; allowed: at most {largest}, what the model has")
        return size or largest


class StudentState(State):
    """A dense state whose matrices are picked from those of another."""

    def __init__(self, whole: State, sizes: StudentSizes) -> None:
        """Raises RecipeError if the sizes are impossible."""
        self.whole = whole
        self.config = sizes.config(whole.config)
        self._layers = evenly(whole.config.num_hidden_layers, self.config.num_hidden_layers)
        head, group = head_dim(whole.config), heads_per_kv_head(whole.config)
        heads = evenly(whole.config.num_key_value_heads, self.config.num_key_value_heads)
        queries, keys = unit_columns(heads, head * group), unit_columns(heads, head)
        channels = evenly(whole.config.intermediate_size, self.config.intermediate_size)
        self._hidden = evenly(whole.config.hidden_size, self.config.hidden_size)
        self._rows = {Q: queries, K: keys, V: keys, GATE: channels, UP: channels}
        self._columns = {O: queries, DOWN: channels}

    def layer(self, index: int) -> dict[str, Tensor | Weight]:
        """The layer [index] of the student, picked from one of the whole model."""
        return self._pick(self.whole.layer(int(self._layers[index])))

    def outer(self) -> dict[str, Tensor | Weight]:
        """The rows of the embedding and of the head are tokens: they stay."""
        outer = self.whole.outer()
        return {
            name: Dense(_matrix(name, value)[:, self._hidden].contiguous())
            if isinstance(value, Weight)
            else value[self._hidden]
            for name, value in outer.items()
        }

    def _pick(self, part: Part) -> dict[str, Tensor | Weight]:
        picked: dict[str, Tensor | Weight] = {}
        for name, value in part.items():
            rows = self._rows.get(name.removesuffix(".bias"), self._hidden)
            if isinstance(value, Weight):
                columns = self._columns.get(name, self._hidden)
                picked[name] = Dense(_matrix(name, value)[rows][:, columns].contiguous())
            else:
                picked[name] = value if len(value) == head_dim(self.config) else value[rows]
        return picked


def evenly(count: int, kept: int) -> Tensor:
    """The indices [kept] int64 of so many of `count` things, spread evenly, the first and the last among
    them."""
    return torch.linspace(0, count - 1, kept).round().long()


def _matrix(name: str, value: Weight) -> Tensor:
    if not isinstance(value, Dense):
        raise RecipeError(
            f"student: {name} is {type(value).__name__}; a fresh student is made of Dense weights"
        )
    return value.weight
