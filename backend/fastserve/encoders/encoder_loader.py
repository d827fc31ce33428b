"""Loads a checkpoint into an `EncoderModel`, and what comes behind it: the head of a classifier."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastserve.encoders.encoder_checkpoint import Shapes
from fastserve.encoders.encoder_config import EncoderConfig
from fastserve.encoders.encoder_model import (
    EncoderLayer,
    EncoderModel,
    EncoderWeights,
    LayerNorm,
    Projection,
)
from fastserve.encoders.smoothing import Inputs, smoothed_linear
from fastserve.models.linear_reader import LinearReader


def body_shapes(config: EncoderConfig) -> Shapes:
    """The shape of every tensor that the body of an encoder of this config has, by name."""
    names, hidden = config.names, config.hidden_size
    shapes: Shapes = {f"{names.word_embeddings}.weight": (config.vocab_size, hidden)}
    if names.position_embeddings:
        shapes[f"{names.position_embeddings}.weight"] = (config.num_positions, hidden)
    if names.token_type_embeddings:
        shapes[f"{names.token_type_embeddings}.weight"] = (config.num_token_types, hidden)
    if names.relative_bias:
        shapes[f"{names.relative_bias}.weight"] = (config.relative_buckets, config.num_heads)
    shapes |= norm_shapes(config, names.embedding_norm)
    for index in range(config.num_layers):
        shapes |= _layer_shapes(config, index)
    if names.final_norm:
        shapes |= norm_shapes(config, names.final_norm)
    return shapes


def _layer_shapes(config: EncoderConfig, index: int) -> Shapes:
    names, hidden = config.names, config.hidden_size
    qkv_rows = 3 * hidden // len(names.qkv_proj)
    up_rows = config.intermediate_size * (2 if config.pre_norm else 1)
    linears = {
        **dict.fromkeys(names.qkv_proj, (qkv_rows, hidden, config.attention_bias)),
        names.o_proj: (hidden, hidden, config.attention_bias),
        names.up_proj: (up_rows, hidden, config.mlp_bias),
        names.down_proj: (hidden, config.intermediate_size, config.mlp_bias),
    }
    prefix = names.layer.format(index)
    shapes: Shapes = {}
    for name, (rows, columns, has_bias) in linears.items():
        shapes |= linear_shapes(prefix + name, rows, columns, has_bias)
    if _has_attention_norm(config, index):
        shapes |= norm_shapes(config, prefix + names.attention_norm)
    return shapes | norm_shapes(config, prefix + names.mlp_norm)


def _has_attention_norm(config: EncoderConfig, index: int) -> bool:
    return index > 0 or not config.pre_norm


def norm_shapes(config: EncoderConfig, name: str) -> Shapes:
    """The tensors of a norm."""
    kinds = ("weight", "bias") if config.norm_bias else ("weight",)
    return {f"{name}.{kind}": (config.hidden_size,) for kind in kinds}


def linear_shapes(name: str, rows: int, columns: int, has_bias: bool) -> Shapes:
    """The tensors of a linear layer."""
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if has_bias else {})


@dataclass(frozen=True)
class EncoderLoader:
    """Loads an encoder whose tensors are known to be there."""

    config: EncoderConfig
    reader: LinearReader
    inputs: Inputs | None = None
    """Of the projections, where these are to be smoothed; see `smoothing`."""

    def load(self) -> EncoderModel:
        """The body."""
        config, names = self.config, self.config.names
        weights = EncoderWeights(
            word_embeddings=self.reader.fused(f"{names.word_embeddings}.weight"),
            position_embeddings=self._table(names.position_embeddings),
            token_type_embeddings=self._table(names.token_type_embeddings),
            embedding_norm=self.norm(names.embedding_norm),
            relative_bias=self._table(names.relative_bias),
            layers=[self._layer(index) for index in range(config.num_layers)],
            final_norm=self.norm(names.final_norm) if names.final_norm else None,
        )
        return EncoderModel(config, weights)

    def norm(self, name: str) -> LayerNorm:
        """The norm of that name."""
        bias = self.reader.fused(f"{name}.bias") if self.config.norm_bias else None
        return LayerNorm(self.reader.fused(f"{name}.weight"), bias, self.config.norm_eps)

    def _table(self, name: str) -> Tensor | None:
        return self.reader.fused(f"{name}.weight") if name else None

    def _projection(self, key: tuple[int, str], has_bias: bool, modules: list[str]) -> Projection:
        """The linear layers of these names as one; `key` is what `inputs` call it."""
        if self.inputs is None:
            return self.reader.linear(has_bias, *modules)
        weight = self.reader.fused(*(f"{module}.weight" for module in modules))
        bias = self.reader.fused(*(f"{module}.bias" for module in modules)) if has_bias else None
        return smoothed_linear(self.inputs[key], weight, bias)

    def _layer(self, index: int) -> EncoderLayer:
        config, names = self.config, self.config.names
        prefix = names.layer.format(index)

        def linear(name: str, has_bias: bool, *modules: str) -> Projection:
            return self._projection((index, name), has_bias, [prefix + module for module in modules])

        return EncoderLayer(
            qkv_proj=linear("qkv_proj", config.attention_bias, *names.qkv_proj),
            o_proj=linear("o_proj", config.attention_bias, names.o_proj),
            attention_norm=(
                self.norm(prefix + names.attention_norm) if _has_attention_norm(config, index) else None
            ),
            up_proj=linear("up_proj", config.mlp_bias, names.up_proj),
            down_proj=linear("down_proj", config.mlp_bias, names.down_proj),
            mlp_norm=self.norm(prefix + names.mlp_norm),
            window=config.windows[index] if config.windows else None,
            rotary_theta=config.rotary_thetas[index] if config.rotary_thetas else None,
        )
