"""Our decoder of the Llama family: plain functions over `fastserve_kernels`, weights fused and packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve.models.decoder_config import DecoderConfig
from fastserve.models.kv_cache import KVCache, KVCaches, KVCacheShapes
from fastserve.models.linear import AnyLinear
from fastserve_kernels import ops
from fastserve_kernels.attention_metadata import AttentionMetadata


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of a layer, fused where one input meets several of them."""

    input_norm: Tensor
    qkv: AnyLinear
    """Rows: all heads' queries, then keys, then values."""
    query_norm: Tensor | None
    key_norm: Tensor | None
    """Over each head's query and key (Qwen3); None: not normed."""
    output: AnyLinear
    mlp_norm: Tensor
    gate_up: AnyLinear
    down: AnyLinear
    sliding_window: int | None


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a decoder, on one device and of one dtype."""

    embedding: Tensor
    """[vocab, hidden]."""
    layers: list[DecoderLayer]
    final_norm: Tensor
    head: AnyLinear


class Decoder:
    """A `CausalLM` of the Llama family."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, max_position: int) -> None:
        """Serves sequences of up to `max_position` tokens: the rotary tables are made for so many."""
        self.config = config
        self.weights = weights
        self.max_position = max_position
        self.vocab_size = config.vocab_size
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self._cos, self._sin = config.rotary_tables(max_position, self.dtype, self.device)
        self._scale = config.head_dim**-0.5
        self._head_counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]

    def kv_cache_shapes(self, num_blocks: int, block_size: int) -> KVCacheShapes:
        """The shapes of each layer's key and value cache."""
        shape = (num_blocks, block_size, self.config.num_kv_heads, self.config.head_dim)
        return [(shape, shape)] * self.config.num_layers

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, meta: AttentionMetadata, kv_caches: KVCaches) -> Tensor:
        """The normed hidden states [T, hidden] of token_ids [T] int64; keys and values go into the caches."""
        eps = self.config.norm_eps
        rotation = (self._cos[meta.positions], self._sin[meta.positions])
        hidden = self.weights.embedding[token_ids]
        layers = self.weights.layers
        # Each norm follows an addition to `hidden`, and the two are one operator.
        next_norms = [*(layer.input_norm for layer in layers[1:]), self.weights.final_norm]
        normed = ops.rms_norm(hidden, layers[0].input_norm, eps)
        for layer, next_norm, kv_cache in zip(layers, next_norms, kv_caches, strict=True):
            attended = layer.output(self._attention(layer, normed, rotation, meta, kv_cache))
            normed, hidden = ops.add_rms_norm(attended, hidden, layer.mlp_norm, eps)
            transformed = layer.down(ops.swiglu(layer.gate_up(normed)))
            normed, hidden = ops.add_rms_norm(transformed, hidden, next_norm, eps)
        return normed

    def _attention(
        self,
        layer: DecoderLayer,
        normed: Tensor,
        rotation: tuple[Tensor, Tensor],
        meta: AttentionMetadata,
        cache: KVCache,
    ) -> Tensor:
        """What each token gathers from those before it, [T, heads * head_dim]."""
        heads = layer.qkv(normed).view(normed.shape[0], -1, self.config.head_dim)
        q, k, v = heads.split(self._head_counts, dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            q = ops.rms_norm(q, layer.query_norm, self.config.norm_eps)
            k = ops.rms_norm(k, layer.key_norm, self.config.norm_eps)
        caches, scales = (cache.keys, cache.values), (cache.k_scale, cache.v_scale)
        q = ops.rotary_write_kv(q, k, v, *rotation, *caches, meta.slot_mapping, *scales)
        attended = ops.paged_attention(q, *caches, meta, self._scale, layer.sliding_window, None, *scales)
        return attended.flatten(1)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """The scores [n, vocab] float32 of the token that follows each row of `hidden` [n, hidden]."""
        return self.weights.head(hidden).float()
