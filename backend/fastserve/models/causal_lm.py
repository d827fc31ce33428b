"""What the engine sees of a model: tokens and paged caches go in, hidden states and logits come out."""

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
    def vocab_size(self) -> int: ...

    @property
    def max_position(self) -> int:
        """Tokens of the longest sequence that it serves."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations, and of caches that are not quantized."""

    @property
    def device(self) -> torch.device: ...

    def kv_cache_shapes(self, num_blocks: int, block_size: int) -> KVCacheShapes:
        """The shapes of each layer's key and value cache."""

    def forward(self, token_ids: Tensor, meta: AttentionMetadata, kv_caches: KVCaches) -> Tensor:
        """Computes token_ids [T] int64 of a ragged batch and writes their keys and values into the caches.

        Returns what `logits` wants of each token: the final hidden states [T, hidden].
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """The scores [n, vocab] float32 of the token that follows each row of `hidden` [n, hidden]."""


def resolve_max_model_len(model: object, limit: int, max_model_len: int) -> int:
    """Tokens of the longest sequence to serve: as the operator wishes, or the model's own `limit` (wish 0).

    Raises ModelError for more than the limit.
    """
    if max_model_len > limit:
        raise ModelError(f"max_model_len: got {max_model_len}; {model} allows at most {limit}")
    return max_model_len or limit
