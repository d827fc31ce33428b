"""The sizes of a decoder that structural pruning changes, and a layer cut down to them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig

from fastserve.compression.errors import RecipeError
from fastserve.compression.pruning.columns import unit_columns
from fastserve.compression.state.meta_model import MetaModel
from fastserve.compression.state.model_state import Part
from fastserve_kernels.formats import Dense, Weight

Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741 -- as the papers call it
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
BEFORE_ATTENTION, BEFORE_MLP = "input_layernorm", "post_attention_layernorm"
_MODULES = {Q, K, V, O, GATE, UP, DOWN, BEFORE_ATTENTION, BEFORE_MLP}
_NORMS_OF_HEADS = {"self_attn.q_norm", "self_attn.k_norm"}


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder; all layers of a model are alike."""

    layers: tuple[int, ...]
    """The layers that are kept, by their index in the model as it came."""
    kv_heads: int
    """Key/value heads that are kept, with the query heads that read them."""
    channels: int
    """Channels of the MLP."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> DecoderShape:
        """The shape of a model of this config, unpruned."""
        return cls(
            tuple(range(config.num_hidden_layers)), config.num_key_value_heads, config.intermediate_size
        )

    def config(self, config: PretrainedConfig) -> PretrainedConfig:
        """The config of a model of this shape, all else as in the given one."""
        smaller = copy.deepcopy(config)
        smaller.head_dim = head_dim(config)
        smaller.num_attention_heads = self.kv_heads * heads_per_kv_head(config)
        smaller.num_key_value_heads = self.kv_heads
        smaller.intermediate_size = self.channels
        smaller.num_hidden_layers = len(self.layers)
        if getattr(config, "layer_types", None):
            smaller.layer_types = [config.layer_types[index] for index in self.layers]
        return smaller


def heads_per_kv_head(config: PretrainedConfig) -> int:
    """Query heads that share a key/value head (grouped-query attention)."""
    heads: int = config.num_attention_heads
    return heads // int(config.num_key_value_heads)


def head_dim(config: PretrainedConfig) -> int:
    """Channels of a head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def check_layers(config: PretrainedConfig) -> None:
    """Raises RecipeError unless the layers are those of the Llama family: attention and a gated MLP, each
    with one norm before it, their outputs added to what entered."""
    tensors = MetaModel.of(config).tensors(0)
    modules = {name.rpartition(".")[0] for name in tensors} - _NORMS_OF_HEADS
    if modules != _MODULES:
        raise RecipeError(
            f"a layer of {config.model_type} has {', '.join(sorted(modules))}; allowed: a model whose layers "
            f"have {', '.join(sorted(_MODULES))}"
        )


def parameters(config: PretrainedConfig) -> int:
    """The number of parameters of a whole model; a head that is the embedding counts once."""
    return sum(parameter.numel() for parameter in MetaModel.of(config).model.parameters())


def prune_layer(part: Part, shape: DecoderShape, config: PretrainedConfig) -> dict[str, Tensor | Weight]:
    """A layer of a model of this config without the heads and channels that are to go, on which its output
    does not depend: their columns of o_proj and down_proj are zero."""
    head = head_dim(config)
    group = head * heads_per_kv_head(config)
    kv_heads = _kept(part[O], group, shape.kv_heads)
    channels = _kept(part[DOWN], 1, shape.channels)
    queries, keys = unit_columns(kv_heads, group), unit_columns(kv_heads, head)
    rows = {Q: queries, K: keys, V: keys, GATE: channels, UP: channels}
    columns = {O: queries, DOWN: channels}
    result: dict[str, Tensor | Weight] = {}
    for name, value in part.items():
        module = name.removesuffix(".bias")
        if isinstance(value, Tensor):
            result[name] = value[rows[module]] if module in rows else value
        elif name in rows:
            result[name] = Dense(_dense(value)[rows[name]])
        else:
            result[name] = Dense(_dense(value)[:, columns[name]].contiguous())
    return result


def _kept(weight: Tensor | Weight, unit: int, count: int) -> Tensor:
    """The units of columns [count] that are not zero."""
    sizes = _dense(weight).float().unflatten(1, (-1, unit)).square().sum((0, 2))
    return sizes.topk(count).indices.sort().values


def _dense(weight: Tensor | Weight) -> Tensor:
    assert isinstance(weight, Dense)
    return weight.weight
