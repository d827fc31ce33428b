"""The interface between the engine and a model: tokens and paged caches go in, logits come out."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastserve.checkpoints.kv_cache_scheme import KVCacheShapes
from fastserve.checkpoints.model_error import ModelError
from fastserve.models.kv_cache import KVCaches
from fastserve_kernels.attention_metadata import AttentionMetadata


class CausalLM(Protocol):
    """A causal language model whose keys and values lie in a paged cache that the caller owns."""

    @property
    def vocab_size(self) -> int:
        """The number of token ids: logits have one entry for each."""

    @property
    def max_position(self) -> int:
        """The length of the longest sequence that it serves, in tokens."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations, and of caches that are not quantized."""

    @property
    def device(self) -> torch.device:
        """The device of weights and activations; caches lie there too."""

    def kv_cache_shapes(self, num_blocks: int, block_size: int) -> KVCacheShapes:
        """The shapes [num_blocks, block_size, kv_heads, head_dim] of each layer's key and value cache."""

    def forward(self, token_ids: Tensor, meta: AttentionMetadata, kv_caches: KVCaches) -> Tensor:
        """Computes token_ids [T] int64 of a ragged batch and writes their keys and values into the caches.

        Returns the final hidden states [T, hidden], from which `logits` computes.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """The scores [n, vocab] float32 of the token that follows each row of `hidden` [n, hidden]."""


def resolve_max_model_len(model: object, limit: int, max_model_len: int) -> int:
    """The length of the longest sequence to serve, in tokens: `max_model_len`, or the model's own `limit` if
    that is 0.

    Raises ModelError, which names `model`, for more than the limit.
    """
    if max_model_len > limit:
        raise ModelError(f"max_model_len: got {max_model_len}; {model} allows at most {limit}")
    return max_model_len or limit
