"""Loads a checkpoint into a `Decoder`.

Tensors are read one by one, fused and packed as they come: never is much more than one copy in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastserve.checkpoints.checkpoint import Checkpoint
from fastserve.checkpoints.decoder_config import DecoderConfig
from fastserve.checkpoints.online_quantization import quantize, quantize_head
from fastserve.checkpoints.weight_rows import stack_rows
from fastserve.models.decoder import Decoder, DecoderLayer, DecoderWeights
from fastserve.models.decoder_tensors import EMBEDDING, HEAD, check_tensors, has_own_head
from fastserve.models.lazy_weights import LazyEmbedding, LazyLayers
from fastserve.models.linear import AnyLinear, Linear, MixedFormatLinear
from fastserve_kernels.formats import Dense, Weight
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.preparation import QUANTIZES_ACTIVATIONS, prepare

Quantize = Callable[[str, Tensor, str], Weight]


def load_decoder(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    max_position: int,
    quantization: str,
    quantizes_activations: Callable[[], bool],
    one_layer_at_a_time: bool = False,
) -> Decoder:
    """A decoder in `dtype` on `device`, for sequences of up to `max_position` tokens.

    `quantizes_activations`: see `prepare`; it is asked if a weight can have them so. `quantization` and
    `one_layer_at_a_time` are those of `load_model`. Raises ModelError if tensors are missing, misshapen or
    unexpected; it names them.
    """
    if config.tie_word_embeddings and has_own_head(checkpoint, dtype):
        config = replace(config, tie_word_embeddings=False)
    check_tensors(config, checkpoint)
    loader = _WeightLoader(config, checkpoint, dtype, device, quantization, quantizes_activations)
    return Decoder(config, loader.load(one_layer_at_a_time), max_position)


@dataclass(frozen=True)
class _WeightLoader:
    """Loads the weights of a decoder, whose tensors are known to be there."""

    config: DecoderConfig
    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    quantization: str
    quantizes_activations: Callable[[], bool]

    @property
    def _embedding_name(self) -> str:
        """A tool that stores tied tensors once may keep either of them."""
        return EMBEDDING if EMBEDDING in self.checkpoint.shapes else HEAD

    def load(self, one_layer_at_a_time: bool) -> DecoderWeights:
        layers = LazyLayers(self._layer, self.config.num_layers)
        head = (self._embedding_name if self.config.tie_word_embeddings else HEAD).removesuffix(".weight")
        return DecoderWeights(
            embedding=LazyEmbedding(self._embedding) if one_layer_at_a_time else self._embedding(),
            layers=layers if one_layer_at_a_time else layers[:],
            final_norm=self._fused("model.norm.weight"),
            lm_head=self._linear(False, head, quantize=quantize_head),
        )

    def _embedding(self) -> Tensor:
        return self._fused(self._embedding_name)

    def _layer(self, index: int) -> DecoderLayer:
        config, prefix = self.config, f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return DecoderLayer(
            input_layernorm=self._fused(f"{prefix}input_layernorm.weight"),
            qkv_proj=self._linear(config.qkv_bias, *(f"{attention}{name}_proj" for name in "qkv")),
            q_norm=self._fused(f"{attention}q_norm.weight") if config.qk_norm else None,
            k_norm=self._fused(f"{attention}k_norm.weight") if config.qk_norm else None,
            o_proj=self._linear(config.o_proj_bias, f"{attention}o_proj"),
            post_attention_layernorm=self._fused(f"{prefix}post_attention_layernorm.weight"),
            gate_up_proj=self._linear(config.mlp_bias, f"{mlp}gate_proj", f"{mlp}up_proj"),
            down_proj=self._linear(config.mlp_bias, f"{mlp}down_proj"),
            sliding_window=config.sliding_windows[index],
        )

    def _linear(self, has_bias: bool, *names: str, quantize: Quantize = quantize) -> AnyLinear:
        """The linear layers of these names as one: their rows one below the other."""
        weights = stack_rows(self._weights([f"{name}.weight" for name in names], quantize))
        biases: Sequence[Tensor | None] = [None] * len(weights)
        if has_bias:
            bias = self._fused(*(f"{name}.bias" for name in names))
            biases = bias.split([weight.out_features for weight in weights])
        parts = [Linear(self._prepare(weight), part) for weight, part in zip(weights, biases, strict=True)]
        return parts[0] if len(parts) == 1 else MixedFormatLinear(tuple(parts))

    def _prepare(self, weight: Weight) -> Prepared:
        can_be = isinstance(weight, QUANTIZES_ACTIVATIONS)
        return prepare(weight, self.device, self.dtype, can_be and self.quantizes_activations())

    def _weights(self, names: list[str], quantize: Quantize) -> list[Weight]:
        """The matrices of these names, from the first rows of the fused one to the last; fused already where
        all are numbers."""
        if self.quantization != "auto":
            return [quantize(names[0], self._fused(*names), self.quantization)]
        exact = self.dtype == torch.float32
        packed = [self.checkpoint.read_packed(name, exact) for name in names]
        if all(weight is None for weight in packed):
            return [Dense(self._fused(*names))]
        return [
            Dense(self._fused(name)) if weight is None else weight
            for name, weight in zip(names, packed, strict=True)
        ]

    def _fused(self, *names: str) -> Tensor:
        """The tensors of these names, one below the other, read straight into the place where they stay."""
        shapes = [self.checkpoint.shapes[name] for name in names]
        rows = [shape[0] for shape in shapes]
        fused = torch.empty(sum(rows), *shapes[0][1:], dtype=self.dtype, device=self.device)
        for name, part in zip(names, fused.split(rows), strict=True):
            self.checkpoint.read(name, part)
        return fused
