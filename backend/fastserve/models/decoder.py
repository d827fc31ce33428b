"""Our decoder of the Llama family: plain functions over `fastserve_kernels.ops`, weights fused and packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastserve.checkpoints.decoder_config import DecoderConfig
from fastserve.checkpoints.kv_cache_scheme import KVCacheShapes
from fastserve.models.kv_cache import KVCaches
from fastserve.models.linear import AnyLinear
from fastserve.models.pipeline_stage import PipelineStage
from fastserve.models.tensor_parallel import TensorParallel
from fastserve_kernels import ops
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.kv_cache import KVCache


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of a layer; QKV and gate and up projections are fused, since they share an input."""

    input_layernorm: Tensor
    qkv_proj: AnyLinear
    """Rows: all heads' queries, then keys, then values."""
    q_norm: Tensor | None
    k_norm: Tensor | None
    """RMSNorm over each head's query and key (Qwen3), [head_dim] each; None: there is none."""
    o_proj: AnyLinear
    post_attention_layernorm: Tensor
    gate_up_proj: AnyLinear
    down_proj: AnyLinear
    sliding_window: int | None


class EmbeddingTable(Protocol):
    """The embedding [vocab, hidden]: a tensor, or an object that reads it when rows are looked up."""

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """The embeddings [T, hidden] of token ids [T]."""


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a decoder, on one device and of one dtype."""

    embedding: EmbeddingTable | None
    """None, as `lm_head`: another stage has it."""
    layers: Sequence[DecoderLayer]
    """Iterated in order, so that layers may be read lazily."""
    final_norm: Tensor
    lm_head: AnyLinear | None


class _Batch(NamedTuple):
    """A ragged batch of T tokens on its way through the layers."""

    hidden: Tensor
    """[T, hidden]."""
    residual: Tensor | None
    """[T, hidden], added to `hidden` in one operator with the norm that follows; None at the start."""
    rotation: tuple[Tensor, Tensor]
    """Cosine and sine [T, head_dim] of the tokens' positions."""
    meta: AttentionMetadata


class Decoder:
    """A `CausalLM` of the Llama family."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        max_position: int,
        parallel: TensorParallel | None = None,
        stage: PipelineStage | None = None,
    ) -> None:
        """Serves sequences of up to `max_position` tokens: the rotary tables are made for so many.

        `parallel`: which part of a decoder it is, where several ranks compute one. `stage`: which layers it
        has; None: all. A stage that is not the first takes hidden states [T, hidden] for token ids, and one
        that is not the last gives them as they are before the next layer's norm.
        """
        self.config = config
        self.parallel = parallel
        self.stage = stage
        self.weights = weights
        self.max_position = max_position
        self.vocab_size = config.vocab_size
        self.dtype = weights.final_norm.dtype
        self.device = weights.final_norm.device
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
        return self.forward_embedded(*self.embed(token_ids, meta.positions), meta, kv_caches)

    @torch.inference_mode()
    def embed(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The embeddings [T, hidden] of token_ids [T]; cosine and sine [T, head_dim] of their positions."""
        embedding = self.weights.embedding
        embedded = token_ids if embedding is None else embedding[token_ids]
        return embedded, self._cos[positions], self._sin[positions]

    def zeros(self, num_tokens: int) -> Tensor:
        """Tokens, or hidden states of them where this is not the first stage: what `forward` takes."""
        if self.weights.embedding is None:
            return torch.zeros(num_tokens, self.config.hidden_size, dtype=self.dtype, device=self.device)
        return torch.zeros(num_tokens, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def forward_embedded(
        self, embedded: Tensor, cos: Tensor, sin: Tensor, meta: AttentionMetadata, kv_caches: KVCaches
    ) -> Tensor:
        """`forward`, of what `embed` returns."""
        batch = _Batch(embedded, None, (cos, sin), meta)
        for layer, kv_cache in zip(self.weights.layers, kv_caches, strict=True):
            batch = self._layer_forward(layer, batch, kv_cache)
        normed, hidden = self._norm(batch, self.weights.final_norm)
        return normed if self.stage is None or self.stage.is_last else hidden

    @torch.inference_mode()
    def forward_layerwise(
        self, token_ids: Sequence[Tensor], metas: Sequence[AttentionMetadata], kv_caches: KVCaches
    ) -> list[Tensor]:
        """`forward` of several batches, each layer over all of them before the next: lazy ones are read once.

        The batches hold whole sequences, and may share slots of the caches. Returns the hidden states
        [T, hidden] of each.
        """
        assert self.weights.embedding is not None, "a stage has no layers to go through by themselves"
        embedded = self.weights.embedding[torch.cat(list(token_ids))].split([len(ids) for ids in token_ids])
        batches = [self._embed(rows, meta) for rows, meta in zip(embedded, metas, strict=True)]
        del embedded
        for layer, kv_cache in zip(self.weights.layers, kv_caches, strict=True):
            for number, batch in enumerate(batches):
                batches[number] = self._layer_forward(layer, batch, kv_cache)
        return [self._norm(batch, self.weights.final_norm)[0] for batch in batches]

    def _embed(self, embedded: Tensor, meta: AttentionMetadata) -> _Batch:
        """The batch before the first layer."""
        return _Batch(embedded, None, (self._cos[meta.positions], self._sin[meta.positions]), meta)

    def _layer_forward(self, layer: DecoderLayer, batch: _Batch, kv_cache: KVCache) -> _Batch:
        normed, hidden = self._norm(batch, layer.input_layernorm)
        attended = layer.o_proj(self._attention(layer, normed, batch.rotation, batch.meta, kv_cache))
        norm, eps = layer.post_attention_layernorm, self.config.rms_norm_eps
        normed, hidden = ops.add_rms_norm(attended, hidden, norm, eps)
        transformed = layer.down_proj(ops.swiglu(layer.gate_up_proj(normed)))
        return batch._replace(hidden=hidden, residual=transformed)

    def _norm(self, batch: _Batch, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states [T, hidden] after RMSNorm, and before it, the residual added."""
        if batch.residual is None:
            return ops.rms_norm(batch.hidden, weight, self.config.rms_norm_eps), batch.hidden
        return ops.add_rms_norm(batch.residual, batch.hidden, weight, self.config.rms_norm_eps)

    def _attention(
        self,
        layer: DecoderLayer,
        normed: Tensor,
        rotation: tuple[Tensor, Tensor],
        meta: AttentionMetadata,
        cache: KVCache,
    ) -> Tensor:
        """The attention output [T, heads * head_dim], before `o_proj`; keys and values go into the cache."""
        heads = layer.qkv_proj(normed).view(normed.shape[0], -1, self.config.head_dim)
        q, k, v = heads.split(self._head_counts, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, self.config.rms_norm_eps)
            k = ops.rms_norm(k, layer.k_norm, self.config.rms_norm_eps)
        q = ops.rotary_write_kv(q, k, v, *rotation, cache, meta.slot_mapping)
        return ops.paged_attention(q, cache, meta, self._scale, layer.sliding_window).flatten(1)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """The scores [n, vocab] float32 of the token that follows each row of `hidden` [n, hidden]."""
        assert self.weights.lm_head is not None, "the first stage has the head"
        return self.weights.lm_head(hidden).float()
