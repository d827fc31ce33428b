"""Our encoder: plain functions over `fastserve_kernels.ops`, weights fused and packed.

Attention is all-to-all (Vaswani et al., arXiv 1706.03762) within each sequence of a ragged batch; everything
else goes token by token. So nothing is computed of padding, and a sequence's result does not depend on what
else is in its batch, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fastserve.encoders.encoder_config import MPNET_DISTANCE, EncoderConfig
from fastserve.encoders.ragged_batch import RaggedBatch
from fastserve_kernels import ops

_tanh_gelu = partial(functional.gelu, approximate="tanh")
ACTIVATION_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}
"""By the name in a config: all of `encoder_config.ACTIVATIONS`."""


Projection = Callable[[Tensor], Tensor]
"""A linear layer: x [T, K] to x W^T + b, [T, N]."""


class EncoderBody(Protocol):
    """What turns tokens into hidden states."""

    hidden_size: int
    max_length: int
    """Tokens of the longest sequence."""
    dtype: torch.dtype
    device: torch.device

    def forward(self, batch: RaggedBatch) -> Tensor:
        """The hidden states [T, hidden] of a batch, after the last norm."""


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (arXiv 1607.06450)."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] normed."""
        return functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class EncoderLayer:
    """The weights of a layer."""

    qkv_proj: Projection
    """Rows: all heads' queries, then keys, then values."""
    o_proj: Projection
    attention_norm: LayerNorm | None
    """None: before the first attention of a model whose norms come first."""
    up_proj: Projection
    """Where the MLP is gated: rows of the gate, then of what it is multiplied by."""
    down_proj: Projection
    mlp_norm: LayerNorm
    window: int | None
    rotary_theta: float | None


@dataclass(frozen=True)
class EncoderWeights:
    """All weights of an encoder's body, on one device and of one dtype."""

    word_embeddings: Tensor
    position_embeddings: Tensor | None
    token_type_embeddings: Tensor | None
    embedding_norm: LayerNorm
    relative_bias: Tensor | None
    """[buckets, heads]: what is added to scores, by the bucket of the distance (MPNet)."""
    layers: Sequence[EncoderLayer]
    final_norm: LayerNorm | None


class EncoderModel:
    """An `EncoderBody` of one of the families of `tensor_names`."""

    def __init__(self, config: EncoderConfig, weights: EncoderWeights) -> None:
        self.config = config
        self.weights = weights
        self.hidden_size = config.hidden_size
        self.max_length = config.max_length
        self.dtype = weights.word_embeddings.dtype
        self.device = weights.word_embeddings.device
        self._activation = ACTIVATION_FUNCTIONS[config.activation]
        self._scale = config.head_dim**-0.5
        self._bias = None if weights.relative_bias is None else bias_by_distance(weights.relative_bias)
        self._rotary_tables = {
            theta: self._rotary_table(theta) for theta in dict.fromkeys(config.rotary_thetas)
        }

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch) -> Tensor:
        """The hidden states [T, hidden] of a batch, after the last norm."""
        hidden = self.weights.embedding_norm(self._embed(batch))
        rotations = {
            theta: (cos[batch.positions], sin[batch.positions])
            for theta, (cos, sin) in self._rotary_tables.items()
        }
        compute = self._pre_norm_layer if self.config.pre_norm else self._post_norm_layer
        for layer in self.weights.layers:
            rotation = None if layer.rotary_theta is None else rotations[layer.rotary_theta]
            hidden = compute(layer, hidden, batch, rotation)
        return hidden if self.weights.final_norm is None else self.weights.final_norm(hidden)

    def _embed(self, batch: RaggedBatch) -> Tensor:
        weights = self.weights
        embedded = weights.word_embeddings[batch.token_ids]
        if weights.token_type_embeddings is not None:
            embedded = embedded + weights.token_type_embeddings[batch.token_type_ids]
        if weights.position_embeddings is not None:
            embedded = embedded + weights.position_embeddings[self._positions(batch)]
        return embedded

    def _positions(self, batch: RaggedBatch) -> Tensor:
        """Rows [T] of the table of positions."""
        padding = self.config.padding_idx
        if padding is None:
            return batch.positions
        is_counted = batch.token_ids != padding
        counted = functional.pad(is_counted.cumsum(0), (1, 0))
        lengths = batch.cu_seqlens.diff()
        before = counted[batch.cu_seqlens[:-1]].repeat_interleave(lengths)
        return (counted[1:] - before) * is_counted + padding

    def _post_norm_layer(
        self, layer: EncoderLayer, hidden: Tensor, batch: RaggedBatch, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        assert layer.attention_norm is not None
        attended = layer.o_proj(self._attention(layer, hidden, batch, rotation))
        hidden = layer.attention_norm(attended.add_(hidden))
        transformed = layer.down_proj(self._activation(layer.up_proj(hidden)))
        return layer.mlp_norm(transformed.add_(hidden))

    def _pre_norm_layer(
        self, layer: EncoderLayer, hidden: Tensor, batch: RaggedBatch, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        normed = hidden if layer.attention_norm is None else layer.attention_norm(hidden)
        hidden = hidden + layer.o_proj(self._attention(layer, normed, batch, rotation))
        gate, up = layer.up_proj(layer.mlp_norm(hidden)).chunk(2, dim=-1)
        return layer.down_proj(self._activation(gate) * up).add_(hidden)

    def _attention(
        self, layer: EncoderLayer, x: Tensor, batch: RaggedBatch, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The attention output [T, hidden], before `o_proj`."""
        heads = layer.qkv_proj(x).view(x.shape[0], 3, self.config.num_heads, self.config.head_dim)
        q, k, v = heads.unbind(1)
        if rotation is not None:
            q, k = ops.rotary(q, k, *rotation)
        attended = ops.varlen_attention(q, k, v, batch.cu_seqlens, self._scale, layer.window, self._bias)
        return attended.flatten(1)

    def _rotary_table(self, theta: float) -> tuple[Tensor, Tensor]:
        """Cosine and sine [max_length, head_dim] of all positions."""
        dim = self.config.head_dim
        frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        angles = torch.arange(self.max_length, dtype=torch.float32)[:, None] * frequencies
        both = torch.cat((angles, angles), dim=1)
        return both.cos().to(self.device, self.dtype), both.sin().to(self.device, self.dtype)


def bias_by_distance(relative_bias: Tensor) -> Tensor:
    """The bias [heads, 2 R + 1] of `ops.varlen_attention` for a table [buckets, heads] of T5's buckets.

    Half of the buckets are for keys before the query, half for those behind it. The nearest half of these
    have a bucket each, the others share the rest by the logarithm of their distance up to R (Raffel et al.,
    arXiv 1910.10683).
    """
    each_side = len(relative_bias) // 2
    exact = each_side // 2
    distance = torch.arange(-MPNET_DISTANCE, MPNET_DISTANCE + 1)
    size = distance.abs()
    scaled = torch.log(size.clamp(min=1).float() / exact) / math.log(MPNET_DISTANCE / exact)
    shared = (exact + (scaled * (each_side - exact)).long()).clamp(max=each_side - 1)
    bucket = torch.where(size < exact, size, shared) + each_side * (distance > 0)
    return relative_bias[bucket.to(relative_bias.device)].t().contiguous()
