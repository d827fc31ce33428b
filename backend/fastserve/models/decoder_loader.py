"""Loads a checkpoint into a `Decoder`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastserve.checkpoints.checkpoint import Checkpoint
from fastserve.checkpoints.decoder_config import DecoderConfig
from fastserve.checkpoints.online_quantization import quantize_head
from fastserve.models.decoder import Decoder, DecoderLayer, DecoderWeights
from fastserve.models.decoder_tensors import EMBEDDING, HEAD, check_tensors, has_own_head
from fastserve.models.lazy_weights import LazyEmbedding, LazyLayers
from fastserve.models.linear_reader import LinearReader


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
    reader = LinearReader(checkpoint, dtype, device, quantization, quantizes_activations)
    return Decoder(config, _WeightLoader(config, reader).load(one_layer_at_a_time), max_position)


@dataclass(frozen=True)
class _WeightLoader:
    """Loads the weights of a decoder, whose tensors are known to be there."""

    config: DecoderConfig
    reader: LinearReader

    @property
    def _embedding_name(self) -> str:
        """A tool that stores tied tensors once may keep either of them."""
        return EMBEDDING if EMBEDDING in self.reader.checkpoint.shapes else HEAD

    def load(self, one_layer_at_a_time: bool) -> DecoderWeights:
        layers = LazyLayers(self._layer, self.config.num_layers)
        head = (self._embedding_name if self.config.tie_word_embeddings else HEAD).removesuffix(".weight")
        return DecoderWeights(
            embedding=LazyEmbedding(self._embedding) if one_layer_at_a_time else self._embedding(),
            layers=layers if one_layer_at_a_time else layers[:],
            final_norm=self.reader.fused("model.norm.weight"),
            lm_head=self.reader.linear(False, head, quantize=quantize_head),
        )

    def _embedding(self) -> Tensor:
        return self.reader.fused(self._embedding_name)

    def _layer(self, index: int) -> DecoderLayer:
        config, prefix = self.config, f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        fused, linear = self.reader.fused, self.reader.linear
        return DecoderLayer(
            input_layernorm=fused(f"{prefix}input_layernorm.weight"),
            qkv_proj=linear(config.qkv_bias, *(f"{attention}{name}_proj" for name in "qkv")),
            q_norm=fused(f"{attention}q_norm.weight") if config.qk_norm else None,
            k_norm=fused(f"{attention}k_norm.weight") if config.qk_norm else None,
            o_proj=linear(config.o_proj_bias, f"{attention}o_proj"),
            post_attention_layernorm=fused(f"{prefix}post_attention_layernorm.weight"),
            gate_up_proj=linear(config.mlp_bias, f"{mlp}gate_proj", f"{mlp}up_proj"),
            down_proj=linear(config.mlp_bias, f"{mlp}down_proj"),
            sliding_window=config.sliding_windows[index],
        )
